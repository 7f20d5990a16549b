//! Where a store lies: a folder, or a prefix of a bucket. Names of its files are relative and use `/` in both.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::bucket::Bucket;

/// A folder, or a prefix of a bucket of an object store.
#[derive(Debug, Clone)]
pub enum Place {
    /// A folder of this machine.
    Folder(PathBuf),
    /// `s3://bucket/prefix` or `gs://bucket/prefix`.
    Bucket(Arc<Bucket>),
}

/// Whether `path` is meant as a URL.
#[must_use]
pub fn is_url(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.contains("://"))
}

impl Place {
    /// What `path` means: a folder's path, or a URL with the scheme `file`, `s3` or `gs`.
    /// Credentials and endpoints of object stores are taken from the environment.
    ///
    /// # Errors
    /// If the URL has another scheme or no bucket, or the environment holds settings that cannot be meant.
    pub fn of(path: &Path) -> Result<Self> {
        Self::with_settings(
            path,
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        )
    }

    /// [`Place::of`] with `settings` for the environment, such as `AWS_ENDPOINT_URL`.
    ///
    /// # Errors
    /// As [`Place::of`].
    pub fn with_settings(path: &Path, settings: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let Some(url) = path.to_str().filter(|_| is_url(path)) else {
            return Ok(Self::Folder(path.to_owned()));
        };
        if url.starts_with("file://") {
            let folder = reqwest::Url::parse(url).ok().and_then(|url| url.to_file_path().ok());
            return Ok(Self::Folder(
                folder.with_context(|| format!("{url} names no folder, as file:///data/store does"))?,
            ));
        }
        Ok(Self::Bucket(Arc::new(Bucket::connect(url, settings)?)))
    }

    /// How people know the file called `name`.
    #[must_use]
    pub fn show(&self, name: &str) -> String {
        match self {
            Self::Folder(folder) if name.is_empty() => folder.display().to_string(),
            Self::Folder(folder) => folder.join(name).display().to_string(),
            Self::Bucket(bucket) => bucket.url(name),
        }
    }

    /// Whether there is a file called `name`.
    ///
    /// # Errors
    /// If an object store cannot be asked.
    pub fn holds(&self, name: &str) -> Result<bool> {
        match self {
            Self::Folder(folder) => Ok(folder.join(name).exists()),
            Self::Bucket(bucket) => Ok(bucket.find(name)?.is_some()),
        }
    }

    /// Finds the file called `name`.
    ///
    /// # Errors
    /// If there is none, or it cannot be reached.
    pub(crate) fn open(&self, name: &str) -> Result<Blob> {
        let bytes = match self {
            Self::Folder(folder) => {
                let path = folder.join(name);
                fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len()
            }
            Self::Bucket(bucket) => match bucket.find(name)? {
                Some(found) => found.bytes,
                None => bail!("{} does not exist", bucket.url(name)),
            },
        };
        Ok(Blob { place: self.clone(), name: name.to_owned(), bytes })
    }

    /// The whole of the file called `name`, which must not be longer than `most` bytes.
    ///
    /// # Errors
    /// If there is none, it is longer, or it cannot be read.
    pub(crate) fn read(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let blob = self.open(name)?;
        ensure!(blob.bytes <= most, "{} has {} bytes, expected at most {most}", blob.show(), blob.bytes);
        let mut bytes = Vec::new();
        let context = || format!("cannot read {}", blob.show());
        blob.part(0, blob.bytes)?.read_to_end(&mut bytes).with_context(context)?;
        Ok(bytes)
    }
}

/// A file of a store, and how long it was when it was found.
#[derive(Debug, Clone)]
pub(crate) struct Blob {
    place: Place,
    name: String,
    pub(crate) bytes: u64,
}

impl Blob {
    pub(crate) fn show(&self) -> String {
        self.place.show(&self.name)
    }

    /// Whether reading it means waiting for a network.
    pub(crate) fn is_remote(&self) -> bool {
        matches!(self.place, Place::Bucket(_))
    }

    /// Reads bytes `start..end`, front to back; independent of other readers of the same file.
    pub(crate) fn part(&self, start: u64, end: u64) -> Result<Box<dyn Read + Send + '_>> {
        match &self.place {
            Place::Folder(folder) => {
                let path = folder.join(&self.name);
                let context = || format!("cannot read {}", path.display());
                let mut file = File::open(&path).with_context(context)?;
                file.seek(SeekFrom::Start(start)).with_context(context)?;
                Ok(Box::new(file.take(end - start)))
            }
            Place::Bucket(bucket) => Ok(Box::new(Download {
                bucket,
                name: &self.name,
                at: start,
                end,
                block: Vec::new(),
                used: 0,
            })),
        }
    }
}

/// Bytes asked of an object store at a time.
const BLOCK: u64 = 8 << 20;

/// An object, or a part of it, as it comes in block by block.
struct Download<'a> {
    bucket: &'a Bucket,
    name: &'a str,
    /// Where the next block begins.
    at: u64,
    end: u64,
    block: Vec<u8>,
    used: usize,
}

impl Read for Download<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.used == self.block.len() {
            if self.at == self.end {
                return Ok(0);
            }
            let end = self.end.min(self.at + BLOCK);
            self.block = self.bucket.range(self.name, self.at..end).map_err(io::Error::other)?;
            (self.at, self.used) = (end, 0);
        }
        let n = out.len().min(self.block.len() - self.used);
        out[..n].copy_from_slice(&self.block[self.used..self.used + n]);
        self.used += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_urls_are_told_apart() {
        let of = |text: &str| Place::with_settings(Path::new(text), std::iter::empty());
        for (text, folder) in [("a/b", "a/b"), ("/a b", "/a b"), ("file:///a%20b/c", "/a b/c")] {
            assert!(matches!(of(text).unwrap(), Place::Folder(f) if f == Path::new(folder)), "{text}");
        }
        for (text, word) in [("http://x/y", "s3://"), ("s3:///x", "bucket"), ("file://host/x", "file:///")] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(word), "{error}");
        }
        for (text, shown) in [
            ("s3://b/some/prefix/", "s3://b/some/prefix/train/x"),
            ("s3://b", "s3://b/train/x"),
            ("gs://b/p", "gs://b/p/train/x"),
        ] {
            assert_eq!(of(text).unwrap().show("train/x"), shown);
        }
    }
}
