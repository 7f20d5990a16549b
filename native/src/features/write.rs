//! Laying a pack out on disk: into a hidden sibling first, renamed when its manifest is complete.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use shared::pack::flow::FlowInfo;
use shared::pack::{
    self, ActivationKind, CorpusInfo, DensityHistogram, FileEntry, Manifest, ModelInfo, SaeInfo,
};
use shared::tap::TapPoint;
use tempfile::TempDir;

use super::{Names, Options, Source};

/// Writes the files of a pack.
#[derive(Debug)]
pub struct PackWriter {
    staging: Staging,
    files: BTreeMap<String, FileEntry>,
}

impl PackWriter {
    /// Starts a pack that will appear at `out`.
    ///
    /// # Errors
    /// If `out` holds something that is not a pack, or its folder cannot be written.
    pub fn create(out: &Path) -> Result<Self> {
        Ok(Self { staging: Staging::create(out, pack::MANIFEST)?, files: BTreeMap::new() })
    }

    /// Writes one file.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn add(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.staging.write(path, bytes)?;
        self.files.insert(path.to_owned(), FileEntry::of(bytes));
        Ok(())
    }

    /// Completes `manifest` with the files written, and moves the pack to its place.
    ///
    /// # Errors
    /// If the manifest breaks a rule of the format, or the disk refuses.
    pub fn finish(self, manifest: Manifest) -> Result<()> {
        let manifest = Manifest { files: self.files, ..manifest };
        self.staging.write(pack::MANIFEST, &manifest.write().context("the pack is not complete")?)?;
        self.staging.finish()
    }
}

/// A folder that is built beside its final place and then moved there in one step.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: TempDir,
    out: PathBuf,
}

impl Staging {
    /// A folder that will replace `out`. What is there must be absent, empty, or have `marker` inside:
    /// a folder of the same kind, never somebody's other files.
    pub(crate) fn create(out: &Path, marker: &str) -> Result<Self> {
        let occupied = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
        if (occupied && !out.join(marker).is_file()) || out.is_file() {
            bail!("{} holds something else (no {marker} inside); choose an empty folder", out.display());
        }
        let out =
            std::path::absolute(out).with_context(|| format!("{} is not a usable path", out.display()))?;
        let parent = out.parent().context("the output folder needs a parent folder")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let folder = tempfile::Builder::new()
            .prefix(".partial-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot write into {}", parent.display()))?;
        Ok(Self { folder, out })
    }

    /// The folder to write into.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes one file. Not synced one by one: the folder only gets its name when all are there, and packs
    /// carry hashes.
    pub(crate) fn write(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path().join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Moves the folder to its place; what was there goes away.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { folder, out } = self;
        let context = || format!("cannot move the finished folder to {}", out.display());
        open_up(folder.path()).with_context(context)?;
        let parent = out.parent().with_context(context)?;
        if out.exists() {
            let old = tempfile::Builder::new().prefix(".old-").tempdir_in(parent).with_context(context)?;
            fs::rename(&out, old.path().join("old")).with_context(context)?;
        }
        fs::rename(folder.path(), &out).with_context(context)?;
        // The name it had is gone; nothing is left to remove.
        let _ = folder.keep();
        Ok(())
    }
}

/// Temporary folders are private; a finished one is readable like any other.
#[cfg(unix)]
fn open_up(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn open_up(_folder: &Path) -> std::io::Result<()> {
    Ok(())
}

/// The manifest of a pack made from `source`, without its files.
pub(crate) fn manifest(
    source: &Source<'_>,
    options: &Options,
    names: &Names,
    (point, flow): (TapPoint, Option<FlowInfo>),
    n_tokens: u64,
    n_shards: usize,
    density_histogram: DensityHistogram,
) -> Result<Manifest> {
    let (sae, store) = (&source.file.sae, source.store.manifest());
    let (model, spec) = (&source.model.provenance, source.model.model.spec());
    let dims = sae.dims();
    // A harvest opens files until it has enough tokens; those it took nothing from are not the corpus.
    let text: Vec<_> = store.text.iter().filter(|file| file.documents > 0).collect();
    let evaluation = match source.layers_eval {
        Some(layers) => serde_json::json!(layers),
        None => serde_json::json!(source.eval),
    };
    let provenance = serde_json::json!({
        "writer": concat!("stratascope ", env!("CARGO_PKG_VERSION")),
        "model": model,
        "autoencoder": source.file.metadata,
        "text": text,
        "dropped": store.dropped,
        "options": options,
        "evaluation": evaluation,
    });
    let place = match &flow {
        Some(flow) => format!("{} of {} layers", point.site, flow.layers.len()),
        None => point.to_string(),
    };
    let default_name = || slug(&format!("{}-{}-{}", model.name, place.replace('.', "-"), dims.n_latents));
    let default_title = || format!("{}, {place}, {} latents", model.name, dims.n_latents);
    let corpus = || match &text[..] {
        [] => "unknown text".to_owned(),
        [only] => only.name.clone(),
        [first, rest @ ..] => format!("{} and {} more files", first.name, rest.len()),
    };
    Ok(Manifest {
        format: pack::FORMAT.to_owned(),
        version: pack::VERSION,
        name: names.name.clone().unwrap_or_else(default_name),
        title: names.title.clone().unwrap_or_else(default_title),
        model: ModelInfo {
            name: model.name.clone(),
            architecture: model.architecture.clone(),
            n_layers: spec.n_layers,
            d_model: spec.d_model,
        },
        sae: SaeInfo {
            site: point.site,
            layer: point.layer,
            d_in: dims.d_in,
            n_latents: dims.n_latents,
            rows: sae.rows(),
            activation: ActivationKind::of(sae.activation()),
        },
        corpus: CorpusInfo {
            name: names.corpus.clone().unwrap_or_else(corpus),
            n_tokens,
            sequence_length: store.sequence_length,
        },
        metrics: source.eval.map(super::EvalReport::metrics).or(source.layers_eval.map(crate::flow::metrics)),
        latents_per_shard: options.latents_per_shard,
        n_shards,
        flow,
        density_histogram,
        files: BTreeMap::new(),
        provenance,
    })
}

/// `text` in the letters a pack's name may have.
pub(crate) fn slug(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') {
            out.push(c);
        } else if !out.ends_with('-') {
            out.push('-');
        }
    }
    let trimmed = out.trim_matches(['-', '.']);
    if trimmed.is_empty() { "pack".to_owned() } else { trimmed.chars().take(100).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_plain_names() {
        assert_eq!(slug("SmolLM2 135M  Instruct/resid.14"), "smollm2-135m-instruct-resid.14");
        assert_eq!((slug("../.."), slug("é")), ("pack".to_owned(), "pack".to_owned()));
    }

    #[test]
    fn a_folder_appears_whole_replaces_its_kind_and_spares_others() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("deep/out");
        let first = Staging::create(&out, "mark").unwrap();
        first.write("a/b", b"1").unwrap();
        first.write("mark", b"").unwrap();
        assert!(!out.exists(), "nothing before it is finished");
        first.finish().unwrap();
        assert_eq!(fs::read(out.join("a/b")).unwrap(), b"1");
        let second = Staging::create(&out, "mark").unwrap();
        second.write("mark", b"2").unwrap();
        second.finish().unwrap();
        assert!(!out.join("a").exists(), "the old folder was replaced, not mixed");
        fs::remove_file(out.join("mark")).unwrap();
        fs::write(out.join("precious"), b"").unwrap();
        assert!(Staging::create(&out, "mark").is_err(), "somebody's files are spared");
        drop(Staging::create(&root.path().join("deep/other"), "mark").unwrap());
        assert_eq!(fs::read_dir(root.path().join("deep")).unwrap().count(), 1, "no litter");
    }
}
