//! Bringing one file into the cache: resumed where it stopped, verified, visible only when whole.
//!
//! The bytes are kept as `blobs/HASH`, and `snapshots/COMMIT/PATH` links to them: Hugging Face's own layout, with its
//! names for unfinished files and its locks.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use indicatif::ProgressBar;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::StatusCode;

use super::Repo;
use super::http::Failure;
use super::listing::{Content, RemoteFile, escaped};
use crate::files::{self, hex};
use crate::progress;
use crate::stop::{self, Stopped};
use crate::store::describe::bytes;

/// Bytes read at once.
const PIECE: usize = 1 << 18;
/// Files from this size on show a progress bar.
const SHOW_FROM: u64 = 1 << 22;

/// The path of `file` in the snapshot, fetched if need be.
pub(super) fn fetch(repo: &Repo, file: &RemoteFile) -> Result<PathBuf> {
    let link = repo.snapshot().join(&file.path);
    let Some(hash) = file.content.name() else {
        ensure!(link.is_file(), "{} is gone from the cache", link.display());
        return Ok(link);
    };
    // What Hugging Face's programs put there is taken by its length: they verified it.
    if is_whole(&link, file.size)? {
        return Ok(link);
    }
    let folder = repo.settings.repository(&repo.id);
    let blob = folder.join("blobs").join(hash);
    if !is_whole(&blob, file.size)? {
        let _lock = lock(repo, hash)?;
        // Another process may have brought it while this one waited.
        if !is_whole(&blob, file.size)? {
            Download::new(repo, file, &blob, hash)?.run()?;
        }
    }
    expose(&blob, &link)?;
    Ok(link)
}

fn is_whole(path: &Path, size: u64) -> Result<bool> {
    match fs::metadata(path) {
        Ok(data) if data.len() == size => Ok(true),
        Ok(data) => Err(anyhow!(
            "{} has {} bytes, the hub says {size}: remove it and run again",
            path.display(),
            data.len()
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
}

/// Takes the lock that Hugging Face's programs take for the same file.
fn lock(repo: &Repo, hash: &str) -> Result<File> {
    let folder = repo.settings.repository(&repo.id);
    let name = folder.file_name().unwrap_or_default();
    let path = repo.settings.cache.join(".locks").join(name).join(format!("{hash}.lock"));
    let context = || format!("cannot lock {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(context)?;
    }
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(&path).with_context(context)?;
    if file.try_lock().is_err() {
        tracing::info!("another process is fetching the same file; waiting for it");
        file.lock().with_context(context)?;
    }
    Ok(file)
}

/// Makes `link` show `blob`: by a relative link where there are links, else by a copy.
fn expose(blob: &Path, link: &Path) -> Result<()> {
    let context = || format!("cannot create {}", link.display());
    let parent = link.parent().with_context(context)?;
    fs::create_dir_all(parent).with_context(context)?;
    if fs::symlink_metadata(link).is_ok() {
        fs::remove_file(link).with_context(context)?;
    }
    #[cfg(unix)]
    {
        // From snapshots/COMMIT/… up to the repository's folder, then down into blobs.
        let repository = blob.parent().and_then(Path::parent).with_context(context)?;
        let depth = parent.strip_prefix(repository).with_context(context)?.components().count();
        let name = blob.file_name().with_context(context)?;
        let target = Path::new(&"../".repeat(depth)).join("blobs").join(name);
        std::os::unix::fs::symlink(target, link).with_context(context)
    }
    #[cfg(not(unix))]
    {
        fs::copy(blob, link).map(drop).with_context(context)
    }
}

/// The running hash of what arrived.
enum Hash {
    Sha256(Sha256),
    GitBlob(Sha1),
}

impl Hash {
    fn new(file: &RemoteFile) -> Self {
        match file.content {
            Content::GitBlob(_) => Self::GitBlob(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
            _ => Self::Sha256(Sha256::new()),
        }
    }

    fn update(&mut self, piece: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(piece),
            Self::GitBlob(hash) => hash.update(piece),
        }
    }

    fn finish(&self) -> String {
        match self {
            Self::Sha256(hash) => hex(&hash.clone().finalize()),
            Self::GitBlob(hash) => hex(&hash.clone().finalize()),
        }
    }
}

/// A file on its way.
struct Download<'a> {
    repo: &'a Repo,
    file: &'a RemoteFile,
    blob: &'a Path,
    wanted: &'a str,
    partial: PathBuf,
    out: File,
    have: u64,
    hash: Hash,
    bar: ProgressBar,
}

impl<'a> Download<'a> {
    /// Opens the unfinished file an earlier attempt left, or a new one.
    fn new(repo: &'a Repo, file: &'a RemoteFile, blob: &'a Path, wanted: &'a str) -> Result<Self> {
        let partial = blob.with_file_name(format!("{wanted}.incomplete"));
        let context = || format!("cannot write {}", partial.display());
        if let Some(parent) = blob.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        let out = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
        let out = out.with_context(context)?;
        let bar = if file.size >= SHOW_FROM {
            progress::bar(file.size, "fetch", "bytes")
        } else {
            ProgressBar::hidden()
        };
        let hash = Hash::new(file);
        let mut download = Self { repo, file, blob, wanted, partial, out, have: 0, hash, bar };
        download.take_over()?;
        download.check_space()?;
        Ok(download)
    }

    /// Counts and hashes what is there already.
    fn take_over(&mut self) -> Result<()> {
        if self.out.metadata()?.len() > self.file.size {
            return self.restart();
        }
        let mut buffer = vec![0u8; PIECE];
        loop {
            match self.out.read(&mut buffer)? {
                0 => break,
                n => {
                    self.hash.update(&buffer[..n]);
                    self.have += n as u64;
                }
            }
        }
        self.bar.set_position(self.have);
        self.bar.reset_eta();
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.out.set_len(0)?;
        self.out.seek(SeekFrom::Start(0))?;
        self.hash = Hash::new(self.file);
        self.have = 0;
        self.bar.set_position(0);
        Ok(())
    }

    fn check_space(&self) -> Result<()> {
        let left = self.file.size - self.have;
        let folder = self.partial.parent().unwrap_or(Path::new("."));
        if let Some(free) = files::free_space(folder) {
            ensure!(
                left <= free,
                "{} are still to come and {} has {} free: free space, or move the cache with HF_HOME",
                bytes(left),
                folder.display(),
                bytes(free)
            );
        }
        Ok(())
    }

    fn run(mut self) -> Result<()> {
        let resumed = self.have > 0;
        self.transfer()?;
        if self.hash.finish() != self.wanted && resumed {
            // What an earlier attempt left may have been wrong; what comes now is not mixed with it.
            tracing::warn!("{}: what an earlier attempt left is damaged; fetching all of it", self.file.path);
            self.restart()?;
            self.transfer()?;
        }
        let found = self.hash.finish();
        if found != self.wanted {
            drop(self.out);
            fs::remove_file(&self.partial)
                .with_context(|| format!("cannot remove {}", self.partial.display()))?;
            return Err(anyhow!(
                "the bytes that arrived are not the ones announced: their hash is {found}, expected {}; they were \
                 thrown away, run again",
                self.wanted
            ));
        }
        self.out.sync_data().with_context(|| format!("cannot write {}", self.partial.display()))?;
        fs::rename(&self.partial, self.blob)
            .with_context(|| format!("cannot move the finished file to {}", self.blob.display()))?;
        self.bar.finish_and_clear();
        Ok(())
    }

    /// Receives until all bytes are there; as long as some arrive, a broken connection is taken up again.
    fn transfer(&mut self) -> Result<()> {
        let http = self.repo.http.clone();
        while self.have < self.file.size || self.file.size == 0 {
            let before = self.have;
            let received = http.repeat(|| {
                let result = self.receive();
                // Progress starts the count of failures anew.
                if self.have > before && matches!(result, Err(Failure::Passing(_))) { Ok(()) } else { result }
            });
            received.with_context(|| {
                format!(
                    "{} of {} arrived and are kept: run again to go on",
                    bytes(self.have),
                    bytes(self.file.size)
                )
            })?;
            if self.file.size == 0 {
                break;
            }
        }
        Ok(())
    }

    /// One request for what is missing.
    fn receive(&mut self) -> Result<(), Failure> {
        let repo = self.repo;
        let url = format!(
            "{}/resolve/{}/{}",
            repo.settings.page(&repo.id),
            repo.commit,
            escaped(&self.file.path, true)
        );
        let answer = repo.http.get(&url, self.have, &repo.id, &repo.settings.page(&repo.id))?;
        let starts = answer.header("content-range").and_then(range_start);
        let goes_on = answer.status == StatusCode::PARTIAL_CONTENT && starts == Some(self.have);
        if self.have > 0 && !goes_on {
            // The server cannot go on in the middle.
            self.restart()?;
            if answer.status != StatusCode::OK {
                return Err(Failure::Passing(format!("the server answers {}", answer.status)));
            }
        }
        let mut body = answer.body;
        let mut buffer = vec![0u8; PIECE];
        loop {
            if stop::is_raised() {
                return Err(Failure::Final(Stopped.into()));
            }
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::Passing(error.to_string())),
            };
            if n == 0 {
                break;
            }
            if self.have + n as u64 > self.file.size {
                let size = self.file.size;
                self.restart()?;
                return Err(anyhow!("more bytes arrive than the {size} announced").into());
            }
            let written = self.out.write_all(&buffer[..n]);
            written.with_context(|| format!("cannot write {}", self.partial.display()))?;
            self.hash.update(&buffer[..n]);
            self.have += n as u64;
            self.bar.set_position(self.have);
        }
        if self.have < self.file.size {
            return Err(Failure::Passing("the connection ended early".to_owned()));
        }
        Ok(())
    }
}

/// The first byte of `bytes FIRST-LAST/TOTAL`.
fn range_start(header: &str) -> Option<u64> {
    header.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
