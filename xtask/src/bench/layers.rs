//! Multi-layer autoencoders: several kinds of one dictionary for all layers of a language model, measured layer by layer.
//!
//! `configs/layers.toml` says what is trained; the stages are those of the demo, and go on where they were stopped.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::workshop::{Data, Workshop, show};
use crate::demo::stage::Stages;
use crate::places::Places;
use crate::report::Report;

/// The tables of `configs/layers.toml`.
const STAGES: [&str; 5] = ["harvest", "train", "eval", "lens", "behind"];

/// Arguments of `bench layers`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench layers
  cargo xtask bench layers --model gemma-3-270m")]
pub(crate) struct Args {
    #[command(flatten)]
    data: Data,
}

/// Runs the bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    let mut report = Report::new();
    let data = args.data.ensure(places, &mut report)?;
    let name = data.0.path.file_stem().context("the model has no name")?;
    let work = places.target.join("layers").join(name);
    let shop = Workshop::open(places, data, "layers.toml", &STAGES, work)?;
    let mut stages = Stages::new(&shop.work, &mut report);
    shop.harvest(&mut stages, "resid", "runs the language model and stores the activations of every layer")?;
    let saes = folders(&shop.train(&mut stages, &[])?)?;
    let [eval, behind] = ["eval", "eval-behind"].map(|name| shop.work.join(name));
    let why = "measures all on held-out text, layer by layer";
    shop.eval(&mut stages, ("eval", why), &["--layers"], &saes, &eval)?;
    let lens = [behind_lens(&shop, &mut stages)?];
    shop.eval(&mut stages, ("eval-behind", "measures that one too"), &["--layers"], &lens, &behind)?;
    show(&eval.join("compare.md"))?;
    show(&behind.join("layers.md"))?;
    println!("tables and plots: {}", shop.work.display());
    Ok(())
}

/// Fits a lens, and an autoencoder behind it; returns its folder.
fn behind_lens(shop: &Workshop<'_>, stages: &mut Stages<'_>) -> Result<PathBuf> {
    let [lens, out] = ["lens", "behind"].map(|name| shop.work.join(name));
    let fit = shop.native("lens").args(shop.configs.arguments("lens")?);
    let fit = fit.arg("--store").arg(shop.store()).arg("--out").arg(&lens);
    let why = "fits a linear map of every layer to the last";
    stages.run("lens", why, &lens, false, &[shop.configs.text("lens")?], fit)?;
    let train = shop.native("train").arg("--config").arg(shop.configs.path("behind")?);
    let train = train.arg("--store").arg(shop.store()).arg("--lens").arg(&lens).arg("--out").arg(&out);
    let why = "fits an autoencoder behind it";
    stages.run("behind", why, &out, false, &[shop.configs.text("behind")?], train)?;
    Ok(out)
}

/// The autoencoders in `out`, by name, controls of one layer each in a folder of their own.
fn folders(out: &Path) -> Result<Vec<PathBuf>> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let what = || format!("cannot list {}", folder.display());
        let entries = fs::read_dir(folder).with_context(what)?;
        let mut folders: Vec<PathBuf> =
            entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().with_context(what)?;
        folders.retain(|path| path.is_dir());
        folders.sort_unstable();
        Ok(folders)
    };
    let is_sae = |folder: &PathBuf| folder.join("cfg.json").is_file();
    let mut found = Vec::new();
    for folder in list(out)? {
        if is_sae(&folder) {
            found.push(folder);
        } else {
            found.extend(list(&folder)?.into_iter().filter(is_sae));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::config;

    #[test]
    fn the_committed_configuration_has_every_stage() {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/layers.toml");
        let configs = config::split(&source, &STAGES, folder.path()).unwrap();
        let saes = configs.values("train").unwrap()["sae"].as_array().unwrap();
        assert!(saes.len() >= 4, "top-k as published and with a scalar, BatchTopK, JumpReLU");
        assert!(configs.arguments("eval").unwrap().contains(&"--sequences".to_owned()));
    }

    #[test]
    fn folders_of_autoencoders_are_found_by_name() {
        let out = tempfile::tempdir().unwrap();
        for name in ["b", "a", "no-autoencoder", "single/resid.1", "single/resid.0"] {
            fs::create_dir_all(out.path().join(name)).unwrap();
        }
        for name in ["a", "b", "single/resid.0", "single/resid.1"] {
            fs::write(out.path().join(name).join("cfg.json"), "{}").unwrap();
        }
        assert_eq!(
            folders(out.path()).unwrap(),
            ["a", "b", "single/resid.0", "single/resid.1"].map(|name| out.path().join(name))
        );
    }
}
