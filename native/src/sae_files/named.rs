//! Autoencoders of the Hugging Face hub by name.
//!
//! `gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71` is a folder of Google's repository of that name;
//! `gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical` the one there whose mean L0 is closest to 100;
//! `hf://org/name@revision/folder` a folder of any repository. Only the files of an autoencoder are fetched.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use shared::format::{
    SaeMetadata, dictionary_learning, gemma_scope, gemma_scope_2, mlsae, openmoss, saelens, sparsify,
};
use shared::{Site, TapPoint};

use crate::hub::{Kind, Repo, RepoId, Settings};

/// The mean L0 that makes one of several the canonical one.
const CANONICAL_L0: u64 = 100;
/// Files of an autoencoder; the first ones are weights.
const FILES: [&str; 8] = [
    gemma_scope::PARAMS,
    gemma_scope_2::PARAMS,
    saelens::WEIGHTS,
    dictionary_learning::WEIGHTS,
    sparsify::WEIGHTS,
    mlsae::WEIGHTS,
    saelens::CONFIG,
    openmoss::CONFIG,
];
const N_WEIGHTS: usize = 6;

/// A folder of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    repo: RepoId,
    folder: String,
}

/// Reads a name; `None` when `text` does not look like one, so that it is a path.
pub(super) fn parse(text: &str) -> Option<Named> {
    let (name, revision, folder) = if let Some(body) = text.strip_prefix("hf://") {
        let mut parts = body.splitn(3, '/');
        let (org, name) = (parts.next()?, parts.next()?);
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        (format!("{org}/{name}"), revision, parts.next().unwrap_or_default())
    } else {
        let (release, folder) = text.split_once('/')?;
        if !release.starts_with("gemma-scope-") {
            return None;
        }
        (format!("google/{}", release.trim_end_matches("-canonical")), "main", folder)
    };
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
    let folder = folder.trim_end_matches('/').to_owned();
    let inside = folder.split('/').all(|part| !matches!(part, "." | "..")) && !folder.contains("//");
    let sound = plain(&name) && plain(revision) && plain(&folder) && inside && !name.contains("..");
    let repo = RepoId { kind: Kind::Model, name, revision: revision.to_owned() };
    sound.then_some(Named { repo, folder })
}

impl Named {
    /// Brings the files onto this machine and returns the folder they are in.
    ///
    /// # Errors
    /// If the repository or the folder cannot be had, or holds no autoencoder.
    pub(super) fn fetch(&self, settings: &Arc<Settings>) -> Result<PathBuf> {
        let canonical = self.folder.strip_suffix("/canonical");
        let repo = Repo::open(settings, &self.repo, canonical.unwrap_or(&self.folder))?;
        let within = |folder: &str, file: &str| match folder {
            "" => file.to_owned(),
            folder => format!("{folder}/{file}"),
        };
        let mut folder = self.folder.clone();
        if let Some(parent) = canonical
            && repo.file(&within(&folder, gemma_scope::PARAMS)).is_none()
        {
            folder = within(parent, &closest(&repo, parent)?);
        }
        let weights = FILES[..N_WEIGHTS].iter().any(|file| repo.file(&within(&folder, file)).is_some());
        ensure!(
            weights,
            "{} holds no autoencoder in `{folder}`: wanted one of {}",
            repo.label(),
            FILES[..N_WEIGHTS].join(", ")
        );
        for path in FILES.map(|file| within(&folder, file)) {
            if repo.file(&path).is_some() {
                repo.fetch(&path)?;
            }
        }
        Ok(repo.snapshot().join(folder))
    }

    /// What a Gemma Scope name says about model and tap, where the files do not.
    pub(super) fn describe(&self, metadata: &mut SaeMetadata) {
        let Some((model, tap)) = gemma_scope_source(&self.repo.name, &self.folder) else { return };
        metadata.model_name.get_or_insert(model);
        metadata.tap = metadata.tap.or(tap);
        metadata.context_size = metadata.context_size.or(Some(1024));
        metadata.prepend_bos = metadata.prepend_bos.or(Some(true));
    }
}

/// The folder `average_l0_N` under `parent` whose `N` is closest to 100; the smaller of two.
fn closest(repo: &Repo, parent: &str) -> Result<String> {
    let l0 = |path: &str| {
        let rest = path.strip_prefix(parent)?.strip_prefix("/average_l0_")?;
        rest.strip_suffix(gemma_scope::PARAMS)?.strip_suffix('/')?.parse::<u64>().ok()
    };
    let found =
        repo.files.iter().filter_map(|file| l0(&file.path)).min_by_key(|n| (n.abs_diff(CANONICAL_L0), *n));
    match found {
        Some(n) => Ok(format!("average_l0_{n}")),
        None => bail!("{} has no folders average_l0_N in `{parent}`", repo.label()),
    }
}

/// The model and the tap of a release, such as `google/gemma-scope-9b-it-res` with `layer_20/…`, or of the second edition
/// `google/gemma-scope-2-1b-pt` with `resid_post/layer_7_…`.
fn gemma_scope_source(repo: &str, folder: &str) -> Option<(String, Option<TapPoint>)> {
    if let Some(model) = repo.strip_prefix("google/gemma-scope-2-") {
        return Some((second_edition_model(model)?, second_edition_tap(folder)));
    }
    let mut words = repo.strip_prefix("google/gemma-scope-")?.split('-');
    let (size, tuning, site, end) = (words.next()?, words.next()?, words.next()?, words.next());
    let site = match site {
        "res" => Site::Resid,
        "mlp" => Site::Mlp,
        "att" => Site::Attn,
        "transcoders" => Site::MlpIn,
        _ => return None,
    };
    let model = match tuning {
        "pt" => format!("google/gemma-2-{size}"),
        "it" => format!("google/gemma-2-{size}-it"),
        _ => return None,
    };
    if end.is_some() {
        return None;
    }
    let layer = folder.strip_prefix("layer_").and_then(|rest| rest.split('/').next()?.parse().ok());
    Some((model, layer.map(|layer| TapPoint::new(site, layer))))
}

/// `1b-pt` is of `google/gemma-3-1b-pt`; the smallest model has no `-pt` in its name on the hub.
fn second_edition_model(size_and_tuning: &str) -> Option<String> {
    let (size, tuning) = size_and_tuning.split_once('-')?;
    match (size, tuning) {
        ("270m", "pt") => Some("google/gemma-3-270m".to_owned()),
        (_, "pt" | "it") => Some(format!("google/gemma-3-{size}-{tuning}")),
        _ => None,
    }
}

/// Of `resid_post/layer_7_width_16k_l0_small` and the like; what transcoders read is none of our taps, for it is with the
/// gain of the norm before the MLP.
fn second_edition_tap(folder: &str) -> Option<TapPoint> {
    let (kind, name) = folder.split_once('/')?;
    let site = match kind.trim_end_matches("_all") {
        "resid_post" => Site::Resid,
        "attn_out" => Site::Attn,
        "mlp_out" => Site::Mlp,
        _ => return None,
    };
    let layer = name.strip_prefix("layer_")?.split('_').next()?.parse().ok()?;
    Some(TapPoint::new(site, layer))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use serde_json::json;
    use shared::{Activation, RowScaling, Sae, SaeParts};

    use super::*;
    use crate::hub::tests::server::{Reply, Server};
    use crate::hub::tests::{COMMIT, entry, settings};

    fn params(threshold: f32) -> Vec<u8> {
        let sae = Sae::new(SaeParts {
            d_in: 2,
            d_out: 2,
            w_enc: vec![1.0, 0.0, 0.0, 1.0, -1.0, 1.0],
            b_enc: vec![0.5, 0.0, 0.25],
            w_dec: vec![2.0, 0.0, 0.0, 3.0, 1.0, 1.0],
            b_dec: vec![0.125, -0.125],
            activation: Activation::JumpRelu { threshold: vec![threshold; 3] },
            w_skip: None,
            rows: RowScaling::None,
        });
        let mut bytes = Cursor::new(Vec::new());
        gemma_scope::write(&sae.unwrap(), &mut bytes).unwrap();
        bytes.into_inner()
    }

    fn hub() -> Server {
        let folder = "layer_20/width_16k";
        let files =
            [22, 71, 139, 300].map(|n| (format!("{folder}/average_l0_{n}/params.npz"), params(n as f32)));
        Server::start(move |request| {
            let path = request.path.split('?').next().unwrap();
            let name = "google/gemma-scope-2b-pt-res";
            if path == format!("/api/models/{name}/revision/main") {
                return Reply::ok(json!({"sha": COMMIT}).to_string());
            }
            if let Some(prefix) = path.strip_prefix(&format!("/api/models/{name}/tree/{COMMIT}/")) {
                let list: Vec<_> =
                    files.iter().filter(|(p, _)| p.starts_with(prefix)).map(|(p, b)| entry(p, b)).collect();
                return Reply::ok(json!(list).to_string());
            }
            let wanted = path.strip_prefix(&format!("/{name}/resolve/{COMMIT}/"));
            match files.iter().find(|(p, _)| Some(p.as_str()) == wanted) {
                Some((_, bytes)) => Reply::part(bytes, request),
                None => Reply::refused(404, "EntryNotFound"),
            }
        })
    }

    #[test]
    fn a_release_and_an_id_bring_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let server = hub();
        let settings = settings(&server.address, folder.path());
        for (text, l0) in [
            ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_139", 139.0),
            ("gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical", 71.0),
            ("hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_22", 22.0),
        ] {
            let named = parse(text).unwrap();
            let path = named.fetch(&settings).unwrap();
            let mut file = super::super::read_local(&path).unwrap();
            assert_eq!(file.sae.activation().threshold(0), Some(l0), "{text}");
            named.describe(&mut file.metadata);
            assert_eq!(file.metadata.tap, Some(TapPoint::new(Site::Resid, 20)));
            assert_eq!(file.metadata.model_name.as_deref(), Some("google/gemma-2-2b"));
        }
        let fetched = server.take().iter().filter(|r| r.path.contains("/resolve/")).count();
        assert_eq!(fetched, 3, "only what was named is fetched");
        let absent = parse("gemma-scope-2b-pt-res/layer_20/width_65k").unwrap().fetch(&settings).unwrap_err();
        assert!(format!("{absent:#}").contains("holds no autoencoder in `layer_20/width_65k`"), "{absent:#}");
        assert!(parse("gemma-scope-2b-pt-res/layer_3/canonical").unwrap().fetch(&settings).is_err());
    }

    #[test]
    fn paths_are_not_names() {
        for text in [
            "layer_20/width_16k",
            "/gemma-scope-2b-pt-res/x",
            "gemma-scope-2b-pt-res",
            "runs/a",
            "hf://a",
            "",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        for text in ["gemma-scope-x/../../etc", "hf://a/b/../c", "hf://a/b@x y/c", "gemma-scope-x/a//b"] {
            assert_eq!(parse(text), None, "{text}");
        }
        let source = |repo: &str, folder: &str| {
            gemma_scope_source(repo, folder).map(|(m, t)| (m, t.map(|t| t.to_string())))
        };
        let known = source("google/gemma-scope-9b-it-att", "layer_9/width_16k/canonical");
        assert_eq!(known, Some(("google/gemma-2-9b-it".to_owned(), Some("attn.9".to_owned()))));
        assert_eq!(source("google/gemma-scope-2b-pt-res", "embedding/width_4k").unwrap().1, None);
        let second = |model: &str, folder: &str| source(&format!("google/gemma-scope-2-{model}"), folder);
        let named = |model: &str, tap: Option<&str>| Some((model.to_owned(), tap.map(str::to_owned)));
        assert_eq!(
            second("1b-it", "attn_out_all/layer_17_width_16k_l0_small"),
            named("google/gemma-3-1b-it", Some("attn.17"))
        );
        assert_eq!(
            second("270m-pt", "transcoder/layer_5_width_16k_l0_big"),
            named("google/gemma-3-270m", None)
        );
        assert_eq!(second("1b", "resid_post/layer_5"), None);
    }
}
