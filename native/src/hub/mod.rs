//! Models and data sets of the Hugging Face hub, by id: listed, fetched file by file, verified, kept.
//!
//! `id` reads what a user writes, `settings` what the environment says, `listing` asks which files a revision has,
//! `download` brings one of them, `glob` chooses among them, and `http` is the only place that talks to a network.
//! Files lie in Hugging Face's own cache and in its layout, so that what its Python library has fetched is used here and
//! the other way round. Nothing is asked of the network unless an id of the hub was named.

mod download;
mod glob;
mod http;
pub mod id;
mod listing;
mod model;
mod settings;
#[cfg(test)]
pub(crate) mod tests;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

pub use glob::matches;
pub use id::{DatasetId, Kind, ModelId, RepoId};
pub use listing::{Content, RemoteFile};
pub use model::{Need, fetch_model};
pub use settings::{Settings, set_offline};

use http::Http;

/// A repository at one commit, its files known.
#[derive(Clone)]
pub struct Repo {
    settings: Arc<Settings>,
    http: Arc<Http>,
    /// The repository, with the revision asked for.
    pub id: RepoId,
    /// The commit the revision stood for when it was opened.
    pub commit: String,
    /// Its files, ascending by path. After an offline start without a saved list: those that are on this machine.
    pub files: Vec<RemoteFile>,
}

impl fmt::Debug for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Repo({}, {} files)", self.label(), self.files.len())
    }
}

impl Repo {
    /// Finds the commit of `id` and the files under the folder `prefix` (empty: all).
    ///
    /// # Errors
    /// If the hub does not know the repository or the revision, refuses it, or cannot be reached and the cache does not
    /// hold it.
    pub fn open(settings: &Arc<Settings>, id: &RepoId, prefix: &str) -> Result<Self> {
        let http = Arc::new(Http::new(settings));
        let commit = listing::commit(settings, &http, id)?;
        let files = listing::files(settings, &http, id, &commit, prefix)?;
        Ok(Self { settings: settings.clone(), http, id: id.clone(), commit, files })
    }

    /// `org/name@commit`, for provenance.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}@{}", self.id.name, self.commit)
    }

    /// The file at `path` of the repository.
    #[must_use]
    pub fn file(&self, path: &str) -> Option<&RemoteFile> {
        self.files.binary_search_by(|file| file.path.as_str().cmp(path)).ok().map(|at| &self.files[at])
    }

    /// The folder in which this commit's files appear under their own names.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        self.settings.repository(&self.id).join("snapshots").join(&self.commit)
    }

    /// Brings `path` onto this machine, unless it is there, and returns where it lies.
    ///
    /// # Errors
    /// If the repository has no such file, it cannot be fetched, or what arrives is not what the hub announced.
    pub fn fetch(&self, path: &str) -> Result<PathBuf> {
        let Some(file) = self.file(path) else { bail!("{} has no file {path}", self.label()) };
        download::fetch(self, file).with_context(|| format!("cannot fetch {path} of {}", self.label()))
    }
}
