//! Where a harvest writes: a folder, from which finished files may be sent on to an object store.
//!
//! A harvest into a bucket works in a folder like any other; each bucket of vectors that is finished is recorded there, sent,
//! and only then removed. So a recorded file that still lies in the folder is one that must be (re)sent, and nothing
//! else needs to be remembered. The manifest is sent last.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::partial::Partial;
use super::{CONFIG, PARTIAL, PARTIAL_MANIFEST};
use crate::files;
use crate::stop::{StopFlag, Stopped};
use crate::store::manifest::FileInfo;
use crate::store::{self, MANIFEST, Manifest, Place, Split};

/// The file in the folder of unfinished work that says where the store is sent.
const TARGET: &str = "target.txt";

/// Where a harvest writes.
#[derive(Debug, Clone)]
pub struct Output {
    /// The folder of the store, or of the work on it.
    folder: PathBuf,
    /// Where finished files are sent; a folder that is the store itself sends nothing.
    bucket: Option<Place>,
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Output {
    fn from(folder: &P) -> Self {
        Self::folder(folder.as_ref())
    }
}

impl Output {
    /// A store in `folder`.
    #[must_use]
    pub fn folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), bucket: None }
    }

    /// A store at `place`, worked on in the folder `work`, which a store in a folder does not need.
    ///
    /// # Errors
    /// If `work` is missing for a bucket, or given for a folder.
    pub fn at(place: Place, work: Option<&Path>) -> Result<Self> {
        match (place, work) {
            (Place::Folder(folder), None) => Ok(Self { folder, bucket: None }),
            (Place::Folder(folder), Some(_)) => bail!(
                "--work is for a store in an object store; {} is a folder, and is worked on in place",
                folder.display()
            ),
            (bucket, Some(work)) => Ok(Self { folder: work.to_owned(), bucket: Some(bucket) }),
            (bucket, None) => bail!(
                "give --work DIR, a folder of this machine with room for two buckets of vectors: they are shuffled \
                 there before they are sent to {}",
                bucket.show("")
            ),
        }
    }

    /// Whether the folder is worked in for this place, or is the place.
    fn is_ours(&self) -> bool {
        let found = fs::read_to_string(self.folder.join(PARTIAL).join(TARGET)).ok();
        self.bucket.as_ref().is_none_or(|bucket| found == Some(bucket.show("")))
    }

    /// How people know the store.
    #[must_use]
    pub fn show(&self) -> String {
        self.place().show("")
    }

    pub(super) fn work(&self) -> &Path {
        &self.folder
    }

    pub(super) fn is_remote(&self) -> bool {
        self.bucket.is_some()
    }

    pub(super) fn place(&self) -> Place {
        self.bucket.clone().unwrap_or_else(|| Place::Folder(self.folder.clone()))
    }

    /// Notes where the store goes; a resumed harvest must go to the same place.
    ///
    /// # Errors
    /// If an earlier run went elsewhere, or there is a finished store.
    pub(super) fn claim(&self) -> Result<()> {
        let path = self.folder.join(PARTIAL).join(TARGET);
        let found = fs::read_to_string(&path).ok();
        let wanted = self.bucket.as_ref().map(|bucket| bucket.show(""));
        if self.folder.join(PARTIAL_MANIFEST).exists() {
            ensure!(
                found == wanted,
                "the unfinished harvest in {} goes to {}, not to {}",
                self.folder.display(),
                found.as_deref().unwrap_or("that folder itself"),
                self.show()
            );
        }
        let Some(wanted) = wanted else { return Ok(()) };
        ensure!(!self.place().holds(MANIFEST)?, "{wanted} holds a finished store: choose another prefix");
        files::write_bytes(&path, wanted.as_bytes())
    }

    /// Sends every finished shard that still lies in the folder, and removes it there.
    ///
    /// # Errors
    /// [`Stopped`] between two files, or if one cannot be sent.
    pub(super) fn send_shards(&self, partial: &Partial, stop: &StopFlag) -> Result<()> {
        let Some(Place::Bucket(bucket)) = &self.bucket else { return Ok(()) };
        let sent = recorded(partial).par_iter().try_for_each(|(name, info)| {
            let path = self.folder.join(name);
            if !path.exists() {
                return Ok(());
            }
            if stop.is_raised() {
                return Err(Stopped.into());
            }
            bucket.send(&path, name, info)?;
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
        });
        sent.map_err(|error| if error.is::<Stopped>() { error } else { error.context(self.kept()) })
    }

    fn kept(&self) -> String {
        format!("what is finished is kept in {}; run the same command again to go on", self.folder.display())
    }

    /// Sends what is left of a finished store, checks that everything is there, and sends the manifest.
    ///
    /// # Errors
    /// If a file cannot be sent, or a shard that was sent is gone or has another length.
    pub(super) fn finish(&self, manifest: &Manifest) -> Result<()> {
        let Some(Place::Bucket(bucket)) = &self.bucket else { return Ok(()) };
        let there = bucket.list()?;
        for (name, info) in manifest.files() {
            if self.folder.join(&name).exists() {
                bucket.send(&self.folder.join(&name), &name, info).with_context(|| self.kept())?;
            } else {
                ensure!(
                    there.get(&name) == Some(&info.bytes),
                    "{} was sent with {} bytes and now has {}: what is in the bucket was changed; harvest again to \
                     another prefix",
                    bucket.url(&name),
                    info.bytes,
                    there.get(&name).map_or("none".to_owned(), u64::to_string)
                );
            }
        }
        for name in [CONFIG, MANIFEST] {
            let path = self.folder.join(name);
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            bucket.write(name, bytes).with_context(|| self.kept())?;
        }
        Ok(())
    }

    /// Removes everything that is no part of the finished store: the folder of unfinished work, or all of a folder
    /// that a store in a bucket was worked on in.
    pub(super) fn clean(&self) -> Result<()> {
        if !self.is_ours() {
            // An empty folder is what a kill at the very end leaves of ours; one that is not empty stays.
            let _ = fs::remove_dir(self.folder.join(PARTIAL));
            return Ok(());
        }
        let (mut old, mut folders) = (vec![PARTIAL_MANIFEST], vec![PARTIAL]);
        if self.is_remote() {
            old.extend([MANIFEST, CONFIG]);
            folders.extend(Split::ALL.map(Split::folder));
        }
        // The state goes first, and last the note of whose the folder is: after a kill in between it is still known as ours.
        folders.reverse();
        for path in old.into_iter().map(|name| self.folder.join(name)).filter(|path| path.exists()) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        for path in folders.into_iter().map(|name| self.folder.join(name)).filter(|path| path.exists()) {
            remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }
}

/// Removes a folder with everything in it, [`TARGET`] last.
fn remove(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_name() != TARGET {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir_all(folder)
}

/// The finished shards: their names in the store, and what they are.
fn recorded(partial: &Partial) -> Vec<(String, FileInfo)> {
    let mut files = Vec::new();
    for split in Split::ALL {
        let shards = partial.halves[split as usize].buckets.iter().flatten();
        for (index, shard) in shards.enumerate() {
            let taps = partial.taps.iter().zip(&shard.files);
            files.extend(taps.map(|(tap, info)| (store::shard_name(tap.0, split, index), info.clone())));
        }
    }
    files
}
