//! Which files hold text: paths as given, folders walked in sorted order, data sets of the hub listed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::hub::{self, Content, DatasetId, Repo, Settings};

/// How a file is divided into documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `.txt`: the file is one document.
    Plain,
    /// `.jsonl`, `.ndjson`, `.json`: a JSON object a line, or one array of objects.
    Json,
    /// `.parquet`: a row a document, its text in one column.
    Parquet,
    /// `.arrow`: the same in Arrow's file or stream format, as Hugging Face `datasets` keeps them.
    Arrow,
}

/// How a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// `.gz`.
    Gzip,
    /// `.zst`.
    Zstd,
}

/// Where a file is.
#[derive(Debug, Clone)]
pub enum Place {
    /// On this machine.
    Local(PathBuf),
    /// In a repository of the hub, under this path.
    Hub(Arc<Repo>, String),
}

/// A text file and how to read it.
#[derive(Debug, Clone)]
pub struct TextSource {
    /// Where it is.
    pub place: Place,
    /// Its length in bytes.
    pub bytes: u64,
    /// How it is divided into documents.
    pub kind: Kind,
    /// How it is packed.
    pub compression: Compression,
}

/// What is accepted, for messages.
const ACCEPTED: &str =
    ".txt, .jsonl or .json (each also .gz or .zst), .parquet, .arrow, or hf://datasets/org/name";
/// Folders nested deeper than this are taken for a loop.
const DEEPEST: usize = 64;

impl TextSource {
    /// Recognises a file of this machine by its name; `None` when it is no text file.
    #[must_use]
    pub fn recognise(path: &Path) -> Option<Self> {
        let (kind, compression) = kind_of(path.file_name()?.to_str()?)?;
        let bytes = fs::metadata(path).map_or(0, |data| data.len());
        Some(Self { place: Place::Local(path.to_owned()), bytes, kind, compression })
    }

    /// Its name for people and for records: without the machine's folders; with repository and commit if it is on the hub.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.place {
            Place::Local(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Place::Hub(repo, path) => format!("hf://datasets/{}/{path}", repo.label()),
        }
    }

    /// Whether reading it may need the network.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self.place, Place::Hub(..))
    }

    /// The SHA-256 that is known without reading the file.
    #[must_use]
    pub fn known_sha256(&self) -> Option<String> {
        match &self.place {
            Place::Hub(repo, path) => match &repo.file(path)?.content {
                Content::Sha256(hash) => Some(hash.clone()),
                _ => None,
            },
            Place::Local(_) => None,
        }
    }

    /// The file on this machine; fetched now if it is on the hub.
    ///
    /// # Errors
    /// If it cannot be fetched.
    pub fn local(&self) -> Result<PathBuf> {
        match &self.place {
            Place::Local(path) => Ok(path.clone()),
            Place::Hub(repo, path) => repo.fetch(path),
        }
    }
}

/// What the name of a file says about it.
fn kind_of(name: &str) -> Option<(Kind, Compression)> {
    let name = name.to_ascii_lowercase();
    let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = name.strip_suffix(".zst") {
        (stem, Compression::Zstd)
    } else {
        (name.as_str(), Compression::None)
    };
    let kind = match stem.rsplit_once('.')?.1 {
        "txt" => Kind::Plain,
        "jsonl" | "ndjson" | "json" => Kind::Json,
        "parquet" if compression == Compression::None => Kind::Parquet,
        "arrow" if compression == Compression::None => Kind::Arrow,
        _ => return None,
    };
    Some((kind, compression))
}

/// A bare `.json` is more often a description than data: it is taken only when it is named.
fn is_bare_json(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".json")
}

/// Finds the text files among `paths`: files as given, folders walked in sorted order (other files in them
/// and hidden entries are passed over), data sets of the hub listed. A file reached twice is taken once.
///
/// # Errors
/// If a path does not exist, a file given by name is of no known kind, a data set cannot be listed, or nothing is found.
pub fn find(paths: &[String]) -> Result<Vec<TextSource>> {
    let mut found: Vec<TextSource> = Vec::new();
    for text in paths {
        if let Some(id) = DatasetId::parse(text)? {
            let sources = on_hub(&Settings::from_env()?, &id);
            found.extend(sources.with_context(|| format!("cannot read text {text}"))?);
            continue;
        }
        let path = Path::new(text);
        let metadata = fs::metadata(path).with_context(|| format!("cannot read text {}", path.display()))?;
        if metadata.is_dir() {
            walk(path, 0, &mut found)?;
        } else {
            let source = TextSource::recognise(path);
            found.push(
                source.with_context(|| format!("{} is no text file: expected {ACCEPTED}", path.display()))?,
            );
        }
    }
    let mut seen = HashSet::new();
    found.retain(|source| {
        seen.insert(match &source.place {
            Place::Local(path) => path.canonicalize().unwrap_or_else(|_| path.clone()),
            Place::Hub(..) => PathBuf::from(source.name()),
        })
    });
    if found.is_empty() {
        bail!("no text files in {}: expected {ACCEPTED}", paths.join(", "));
    }
    Ok(found)
}

fn walk(folder: &Path, depth: usize, found: &mut Vec<TextSource>) -> Result<()> {
    let context = || format!("cannot read folder {}", folder.display());
    ensure!(depth < DEEPEST, "{}: more than {DEEPEST} folders deep", folder.display());
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).with_context(context)? {
        entries.push(entry.with_context(context)?);
    }
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let path = entry.path();
        // Links to files are followed, links to folders are not: they can form loops.
        if entry.file_type().with_context(context)?.is_dir() {
            walk(&path, depth + 1, found)?;
        } else if path.is_file() && !is_bare_json(&name) {
            found.extend(TextSource::recognise(&path));
        }
    }
    Ok(())
}

/// The files of a data set: those the path names, or, of a folder or the whole, those of one kind.
pub(crate) fn on_hub(settings: &Arc<Settings>, id: &DatasetId) -> Result<Vec<TextSource>> {
    // Only the folder above the first pattern, or above a path's last component, has to be listed.
    let fixed = id.path.split('/').take_while(|part| !part.contains(['*', '?']));
    let mut fixed: Vec<&str> = fixed.collect();
    if !id.path.contains(['*', '?']) {
        fixed.pop();
    }
    let repo = Arc::new(Repo::open(settings, &id.repo, &fixed.join("/"))?);
    let pattern = id.path.contains(['*', '?']);
    let named = |path: &str| if pattern { hub::matches(&id.path, path) } else { path == id.path };
    let below = |path: &str| id.path.is_empty() || path.starts_with(&format!("{}/", id.path));
    let source = |file: &hub::RemoteFile| {
        let (kind, compression) = kind_of(file.path.rsplit('/').next()?)?;
        let place = Place::Hub(repo.clone(), file.path.clone());
        Some(TextSource { place, bytes: file.size, kind, compression })
    };
    let mut found: Vec<TextSource> =
        repo.files.iter().filter(|file| named(&file.path)).filter_map(source).collect();
    if found.is_empty() && !pattern {
        let inside = repo.files.iter().filter(|file| below(&file.path) && !is_bare_json(&file.path));
        found = of_one_kind(inside.filter_map(source).collect());
    }
    ensure!(
        !found.is_empty(),
        "{} has no text file at `{}`: expected {ACCEPTED}{}",
        repo.label(),
        id.path,
        if settings.offline { " (offline: only what is in the cache is seen)" } else { "" }
    );
    tracing::info!("{}: {} files", repo.label(), found.len());
    Ok(found)
}

/// A repository often holds the same rows in several formats beside notes in plain text: one kind is taken, the first that
/// there is of Parquet, Arrow, JSON and plain text.
fn of_one_kind(sources: Vec<TextSource>) -> Vec<TextSource> {
    let mut kinds: HashMap<Kind, Vec<TextSource>> = HashMap::new();
    for source in sources {
        kinds.entry(source.kind).or_default().push(source);
    }
    let order = [Kind::Parquet, Kind::Arrow, Kind::Json, Kind::Plain];
    order.iter().find_map(|kind| kinds.remove(kind)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_and_named_files_must_be_text() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "b.txt",
            "a.jsonl.zst",
            "sub/c.TXT.gz",
            ".hidden.txt",
            "notes.md",
            "d.parquet",
            "e.parquet.gz",
            "c4-train.json.gz",
            "data.arrow",
            "dataset_info.json",
        ] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let root = folder.path().to_str().unwrap().to_owned();
        let found = find(&[root.clone(), format!("{root}/b.txt")]).unwrap();
        let names: Vec<_> = found.iter().map(TextSource::name).collect();
        assert_eq!(
            names,
            ["a.jsonl.zst", "b.txt", "c4-train.json.gz", "d.parquet", "data.arrow", "c.TXT.gz"]
        );
        assert_eq!((found[0].kind, found[0].compression), (Kind::Json, Compression::Zstd));
        assert_eq!((found[2].kind, found[2].compression, found[2].bytes), (Kind::Json, Compression::Gzip, 1));
        assert_eq!(find(&[format!("{root}/dataset_info.json")]).unwrap()[0].kind, Kind::Json);
        assert!(find(&[format!("{root}/notes.md")]).unwrap_err().to_string().contains("notes.md"));
        assert!(find(&[format!("{root}/absent")]).is_err());
        assert!(find(&["hf://datasets/x".to_owned()]).unwrap_err().to_string().contains("no data set"));
        fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(find(&[format!("{root}/empty")]).unwrap_err().to_string().contains(".jsonl"));
    }
}
