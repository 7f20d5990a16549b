//! Which commit a revision stands for, and which files it has.
//!
//! The commit is written where Hugging Face's programs write it (`refs/`); the list of a commit's files never changes and
//! is saved, so that what was once listed can be used without a network.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use super::http::{Http, Unreachable};
use super::id::{RepoId, is_commit, is_inside};
use super::settings::Settings;
use crate::files;

/// More files than this are no data set one reads.
const MOST_FILES: usize = 2_000_000;

/// What the hub says a file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// SHA-256 of the bytes: large files.
    Sha256(String),
    /// The git object id, a SHA-1 of `blob LENGTH\0` and the bytes: small files.
    GitBlob(String),
    /// Unknown; only of files found in the cache without a list.
    Cached,
}

impl Content {
    /// The name of the file's bytes in the cache.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Sha256(name) | Self::GitBlob(name) => Some(name),
            Self::Cached => None,
        }
    }
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteFile {
    /// Its path in the repository, with slashes.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// What its bytes are.
    pub content: Content,
}

#[derive(Deserialize)]
struct Info {
    sha: String,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// The commit of the revision asked for: from the hub, or from the cache when the hub may not or cannot be asked.
pub(super) fn commit(settings: &Settings, http: &Http, id: &RepoId) -> Result<String> {
    if is_commit(&id.revision) {
        return Ok(id.revision.clone());
    }
    let path = settings.repository(id).join("refs").join(&id.revision);
    let cached =
        || fs::read_to_string(&path).ok().map(|text| text.trim().to_owned()).filter(|c| is_commit(c));
    if settings.offline {
        return cached().with_context(|| {
            format!(
                "{id} at `{}` is not in the cache {}, and the network is forbidden (--offline or HF_HUB_OFFLINE)",
                id.revision,
                settings.cache.display()
            )
        });
    }
    let revision = escaped(&id.revision, false);
    let url = format!("{}/api/{}/{}/revision/{revision}", settings.endpoint, id.kind.plural(), id.name);
    match http.json::<Info>(&url, id, &settings.page(id)) {
        Ok((info, _)) => {
            ensure!(is_commit(&info.sha), "{url}: `{}` is no commit", info.sha);
            if cached().as_ref() != Some(&info.sha) {
                files::write_bytes(&path, info.sha.as_bytes())?;
            }
            Ok(info.sha)
        }
        Err(error) if error.is::<Unreachable>() => match cached() {
            Some(commit) => {
                tracing::warn!("{error}; using commit {commit} of {id} as last seen");
                Ok(commit)
            }
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// The files of `commit` under the folder `prefix`, ascending by path.
pub(super) fn files(
    settings: &Settings,
    http: &Http,
    id: &RepoId,
    commit: &str,
    prefix: &str,
) -> Result<Vec<RemoteFile>> {
    let key = files::sha256(
        [settings.endpoint.as_str(), id.kind.plural(), &id.name, commit, prefix].join("\n").as_bytes(),
    );
    let saved = settings.lists.join(format!("{key}.json"));
    if let Some(list) = read_saved(&saved) {
        return Ok(list);
    }
    let snapshot = settings.repository(id).join("snapshots").join(commit);
    if settings.offline {
        return in_snapshot(&snapshot, id);
    }
    match ask(settings, http, id, commit, prefix) {
        Ok(list) => {
            let text = serde_json::to_vec(&list)?;
            if let Err(error) = files::write_bytes(&saved, &text) {
                tracing::warn!("the list of files of {id} is not saved: {error:#}");
            }
            Ok(list)
        }
        Err(error) if error.is::<Unreachable>() => in_snapshot(&snapshot, id).map_err(|_| error),
        Err(error) => Err(error),
    }
}

fn read_saved(path: &Path) -> Option<Vec<RemoteFile>> {
    let list: Vec<RemoteFile> = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    list.iter().all(is_sound).then_some(list)
}

/// Asks the hub, page by page.
fn ask(settings: &Settings, http: &Http, id: &RepoId, commit: &str, prefix: &str) -> Result<Vec<RemoteFile>> {
    let mut url = format!("{}/api/{}/{}/tree/{commit}", settings.endpoint, id.kind.plural(), id.name);
    if !prefix.is_empty() {
        url.push('/');
        url.push_str(&escaped(prefix, true));
    }
    url.push_str("?recursive=true");
    let mut list = Vec::new();
    let mut next = Some(url);
    while let Some(url) = next.take() {
        let (entries, following): (Vec<Entry>, _) = http.json(&url, id, &settings.page(id))?;
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            let (size, content) = match entry.lfs {
                Some(lfs) => (lfs.size, Content::Sha256(lfs.oid)),
                None => (entry.size, Content::GitBlob(entry.oid)),
            };
            let file = RemoteFile { path: entry.path, size, content };
            if !is_sound(&file) {
                bail!("{url}: the hub lists `{}` with an impossible path, size or hash", file.path);
            }
            list.push(file);
        }
        ensure!(list.len() <= MOST_FILES, "{id} has more than {MOST_FILES} files: name a folder of it");
        ensure!(following.as_ref() != Some(&url), "{url}: the hub's pages go round in circles");
        next = following;
    }
    list.sort_by(|a, b| a.path.cmp(&b.path));
    list.dedup_by(|a, b| a.path == b.path);
    Ok(list)
}

/// A list comes from outside: its paths become paths here, its hashes file names.
fn is_sound(file: &RemoteFile) -> bool {
    let hex = |text: &str, n: usize| {
        text.len() == n && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let content = match &file.content {
        Content::Sha256(text) => hex(text, 64),
        Content::GitBlob(text) => hex(text, 40),
        Content::Cached => false,
    };
    content && is_inside(&file.path) && file.size < 1 << 50
}

/// Without a list: what lies in the snapshot, which may be a part of what the commit has.
fn in_snapshot(snapshot: &Path, id: &RepoId) -> Result<Vec<RemoteFile>> {
    let mut list = Vec::new();
    let mut folders: Vec<PathBuf> = vec![snapshot.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.strip_prefix(snapshot).ok().and_then(Path::to_str).map(|n| n.replace('\\', "/"));
            match (fs::metadata(&path), name) {
                (Ok(data), _) if data.is_dir() => folders.push(path),
                (Ok(data), Some(path)) => {
                    list.push(RemoteFile { path, size: data.len(), content: Content::Cached });
                }
                _ => {}
            }
        }
    }
    list.sort_by(|a, b| a.path.cmp(&b.path));
    if list.is_empty() {
        let at = snapshot.display();
        return Err(anyhow!("{id} is not in the cache ({at}), and the hub cannot be asked"));
    }
    Ok(list)
}

/// Percent-encodes what is no plain character; slashes too, unless they are kept.
pub(super) fn escaped(text: &str, keep_slashes: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (keep_slashes && byte == b'/') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
