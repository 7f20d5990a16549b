//! Which files hold text: paths as given, folders walked in sorted order.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// How a file is divided into documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `.txt`: the file is one document.
    Plain,
    /// `.jsonl`: a JSON object a line, its text in one field.
    JsonLines,
    /// `.parquet`: a row a document, its text in one column.
    Parquet,
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

/// A text file and how to read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextSource {
    /// Where it lies.
    pub path: PathBuf,
    /// How it is divided into documents.
    pub kind: Kind,
    /// How it is packed.
    pub compression: Compression,
}

/// What is accepted, for messages.
const ACCEPTED: &str = ".txt, .jsonl (each also .gz or .zst) or .parquet";
/// Folders nested deeper than this are taken for a loop.
const DEEPEST: usize = 64;

impl TextSource {
    /// Recognises a file by its name; `None` when it is no text file.
    #[must_use]
    pub fn recognise(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
            (stem, Compression::Gzip)
        } else if let Some(stem) = name.strip_suffix(".zst") {
            (stem, Compression::Zstd)
        } else {
            (name.as_str(), Compression::None)
        };
        let kind = match stem.rsplit_once('.')?.1 {
            "txt" => Kind::Plain,
            "jsonl" | "ndjson" => Kind::JsonLines,
            "parquet" if compression == Compression::None => Kind::Parquet,
            _ => return None,
        };
        Some(Self { path: path.to_owned(), kind, compression })
    }
}

/// Finds the text files among `paths`: files as given, folders walked in sorted order (other files in them
/// and hidden entries are passed over). A file reached twice is taken once.
///
/// # Errors
/// If a path does not exist, a file given by name is of no known kind, or nothing is found at all.
pub fn find(paths: &[String]) -> Result<Vec<TextSource>> {
    let mut found: Vec<TextSource> = Vec::new();
    for path in paths.iter().map(Path::new) {
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
    let mut seen = std::collections::HashSet::new();
    found.retain(|s| seen.insert(s.path.canonicalize().unwrap_or_else(|_| s.path.clone())));
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
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        // Links to files are followed, links to folders are not: they can form loops.
        if entry.file_type().with_context(context)?.is_dir() {
            walk(&path, depth + 1, found)?;
        } else if path.is_file() {
            found.extend(TextSource::recognise(&path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_in_order_and_named_files_must_be_text() {
        let folder = tempfile::tempdir().unwrap();
        for name in
            ["b.txt", "a.jsonl.zst", "sub/c.TXT.gz", ".hidden.txt", "notes.md", "d.parquet", "e.parquet.gz"]
        {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let root = folder.path().to_str().unwrap().to_owned();
        let found = find(&[root.clone(), format!("{root}/b.txt")]).unwrap();
        let names: Vec<_> =
            found.iter().map(|s| s.path.strip_prefix(&root).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.jsonl.zst", "b.txt", "d.parquet", "sub/c.TXT.gz"]);
        assert_eq!((found[0].kind, found[0].compression), (Kind::JsonLines, Compression::Zstd));
        assert!(find(&[format!("{root}/notes.md")]).unwrap_err().to_string().contains("notes.md"));
        assert!(find(&[format!("{root}/absent")]).is_err());
        fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(find(&[format!("{root}/empty")]).unwrap_err().to_string().contains(".jsonl"));
    }
}
