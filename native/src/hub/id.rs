//! What a user writes to name something on the hub.
//!
//! `org/name`, `org/name@revision`, `org/name@revision:file.gguf` for models, optionally behind `hf://`;
//! `hf://datasets/org/name@revision/path` for data sets, the path being a file, a folder or a pattern.

use std::fmt;
use std::path::Path;

use anyhow::{Result, bail, ensure};

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    /// The plural that addresses and folder names use.
    #[must_use]
    pub fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The word for messages.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        }
    }
}

/// A repository and the revision of it that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    /// What it holds.
    pub kind: Kind,
    /// `org/name`, or a single name for the hub's oldest repositories.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.word(), self.name)
    }
}

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelId {
    /// Its repository.
    pub repo: RepoId,
    /// One GGUF file of the repository, if one was named.
    pub file: Option<String>,
}

/// Files of a data set on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetId {
    /// Its repository.
    pub repo: RepoId,
    /// A file, a folder or a pattern; empty for the whole repository.
    pub path: String,
}

/// What begins an address of the hub.
const SCHEME: &str = "hf://";
/// The revision meant when none is given.
const MAIN: &str = "main";

impl ModelId {
    /// Reads a model id; `None` when `text` does not look like one, so that it is a path.
    ///
    /// # Errors
    /// If it begins like an address of the hub and is none.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let explicit = text.strip_prefix(SCHEME);
        let body = explicit.unwrap_or(text);
        let (repo, file) = match body.split_once(':') {
            Some((repo, file)) => (repo, Some(file.to_owned())),
            None => (body, None),
        };
        let (name, revision) = repo.split_once('@').unwrap_or((repo, MAIN));
        // Without the scheme there must be an organisation: a single word is more likely a folder mistyped.
        let plausible = is_name(name) && (explicit.is_some() || name.contains('/'));
        if !plausible || name.starts_with("datasets/") {
            ensure!(
                explicit.is_none(),
                "`{text}` names no model of the hub: expected hf://org/name, hf://org/name@revision or \
                 hf://org/name@revision:file.gguf"
            );
            return Ok(None);
        }
        check_revision(revision, text)?;
        if let Some(file) = &file {
            let gguf = Path::new(file).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
            ensure!(gguf && is_inside(file), "`{text}`: `{file}` is not the path of a .gguf file");
        }
        let repo = RepoId { kind: Kind::Model, name: name.to_owned(), revision: revision.to_owned() };
        Ok(Some(Self { repo, file }))
    }
}

impl DatasetId {
    /// Reads `hf://datasets/org/name[@revision][/path]`; `None` when `text` has no `hf://` in front.
    ///
    /// # Errors
    /// If it has, and is not of this form.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let Some(body) = text.strip_prefix(SCHEME) else { return Ok(None) };
        let expected = "expected hf://datasets/org/name, with @revision and /path/of/files if wanted";
        let Some(body) = body.strip_prefix("datasets/") else { bail!("`{text}` is no data set: {expected}") };
        let mut parts = body.trim_end_matches('/').splitn(3, '/');
        let (org, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let path = parts.next().unwrap_or_default().to_owned();
        let (name, revision) = name.split_once('@').unwrap_or((name, MAIN));
        // A revision may hold slashes (refs/convert/parquet); they are written %2F, as in the hub's own addresses.
        let revision = revision.replace("%2F", "/").replace("%2f", "/");
        let name = format!("{org}/{name}");
        ensure!(is_name(&name) && name.contains('/'), "`{text}` is no data set: {expected}");
        check_revision(&revision, text)?;
        ensure!(path.is_empty() || is_inside(&path), "`{text}`: `{path}` leaves the repository");
        Ok(Some(Self { repo: RepoId { kind: Kind::Dataset, name, revision }, path }))
    }
}

/// `name` or `org/name`, of the characters the hub allows.
fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.split('/').count() <= 2 && text.split('/').all(part)
}

fn check_revision(revision: &str, text: &str) -> Result<()> {
    let plain = revision.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    ensure!(
        plain && is_inside(revision),
        "`{text}`: `{revision}` is no revision; expected a branch, a tag or a commit"
    );
    Ok(())
}

/// Whether a path stays below the folder it is taken from.
pub(super) fn is_inside(path: &str) -> bool {
    let odd = path.contains(['\\', '\0']) || path.is_empty() || path.len() > 1024;
    !odd && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Whether `text` is a whole commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_ids() {
        let read = |text: &str| {
            let id = ModelId::parse(text).unwrap()?;
            Some(format!("{} {} {}", id.repo.name, id.repo.revision, id.file.unwrap_or_default()))
        };
        assert_eq!(read("google/gemma-2-2b").unwrap(), "google/gemma-2-2b main ");
        assert_eq!(read("hf://gpt2").unwrap(), "gpt2 main ");
        assert_eq!(read("a/b@refs/pr/3").unwrap(), "a/b refs/pr/3 ");
        assert_eq!(read("a/b@v1:q/x.GGUF").unwrap(), "a/b v1 q/x.GGUF");
        for path in ["model", "./a/b", "/a/b", "a/b/c", "~/b", "../a", "a/b/", "C:\\a", "a//b", ""] {
            assert_eq!(read(path), None, "{path}");
        }
        for wrong in ["hf://a/b/c", "a/b@", "a/b@..", "a/b:weights.bin", "a/b:../x.gguf", "hf://"] {
            assert!(ModelId::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn dataset_ids() {
        let read = |text: &str| {
            let id = DatasetId::parse(text).unwrap()?;
            Some(format!("{} {} {}", id.repo.name, id.repo.revision, id.path))
        };
        assert_eq!(read("hf://datasets/a/b").unwrap(), "a/b main ");
        assert_eq!(read("hf://datasets/a/b@v2/data/*.parquet").unwrap(), "a/b v2 data/*.parquet");
        assert_eq!(read("hf://datasets/a/b@refs%2Fconvert%2Fparquet/").unwrap(), "a/b refs/convert/parquet ");
        assert_eq!(read("texts/a.txt"), None);
        for wrong in ["hf://a/b", "hf://datasets/a", "hf://datasets/a/b/../c", "hf://datasets/a/b@x y"] {
            assert!(DatasetId::parse(wrong).is_err(), "{wrong}");
        }
    }
}
