//! What the environment says about the hub: the variables that Hugging Face's own programs read.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::id::RepoId;
use crate::places::{self, variable};

/// Raised by `--offline`.
static OFFLINE: AtomicBool = AtomicBool::new(false);

/// Forbids this process the network, as `HF_HUB_OFFLINE=1` does.
pub fn set_offline() {
    OFFLINE.store(true, Ordering::Relaxed);
}

/// Where the hub is, where its files are kept, and how it is spoken to.
#[derive(Clone)]
pub struct Settings {
    /// The hub's address without a slash at the end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The cache that Hugging Face's programs share (`HF_HUB_CACHE`, `HF_HOME`).
    pub cache: PathBuf,
    /// The folder of saved lists of files; ours alone.
    pub lists: PathBuf,
    /// The user's token (`HF_TOKEN`, or the file that logging in writes).
    pub token: Option<String>,
    /// Whether the network must not be used (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// The wait before the first repetition of a failed request; it doubles each time.
    pub pause: Duration,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is nobody's business.
        write!(f, "Settings({}, {})", self.endpoint, self.cache.display())
    }
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// If a variable cannot be used, or no home folder is known.
    pub fn from_env() -> Result<Arc<Self>> {
        let endpoint = env::var("HF_ENDPOINT").ok().filter(|text| !text.is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        ensure!(
            endpoint.starts_with("https://") || endpoint.starts_with("http://"),
            "HF_ENDPOINT is `{endpoint}`, expected an address that begins with https://"
        );
        let home = variable("HF_HOME").or_else(|| Some(places::generic_cache()?.join("huggingface")));
        let cache = variable("HF_HUB_CACHE")
            .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .context("no home folder is known here: set HF_HOME to a folder")?;
        let token_file = variable("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let token = env::var("HF_TOKEN").ok().or_else(|| fs::read_to_string(token_file?).ok());
        let token = token.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let is_true = |name: &str| {
            env::var(name)
                .is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
        };
        let offline = OFFLINE.load(Ordering::Relaxed) || is_true("HF_HUB_OFFLINE");
        let lists = places::cache_folder()?.join("hub-lists");
        Ok(Arc::new(Self { endpoint, cache, lists, token, offline, pause: Duration::from_secs(1) }))
    }

    /// The folder of a repository in the cache: `models--org--name`.
    pub(super) fn repository(&self, id: &RepoId) -> PathBuf {
        self.cache.join(format!("{}--{}", id.kind.plural(), id.name.replace('/', "--")))
    }

    /// The page of a repository, for people.
    pub(super) fn page(&self, id: &RepoId) -> String {
        match id.kind {
            super::Kind::Model => format!("{}/{}", self.endpoint, id.name),
            super::Kind::Dataset => format!("{}/datasets/{}", self.endpoint, id.name),
        }
    }
}
