//! Quality: every kind of autoencoder at several sparsities on one store, beside those that other libraries train on it.
//!
//! `configs/pareto.toml` says what is trained; the stages are those of the demo, and go on where they were stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::workshop::{Data, Workshop, show};
use crate::demo::stage::Stages;
use crate::places::Places;
use crate::report::Report;
use crate::run::Program;

/// The tables of `configs/pareto.toml`.
const STAGES: [&str; 4] = ["harvest", "train", "peers", "eval"];
/// The layer whose residual stream is looked at: the middle of SmolLM2's thirty blocks.
const TAP: &str = "resid.14";

/// Arguments of `bench quality`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench quality
  cargo xtask bench quality --peer-python ~/venv/bin/python     beside SAELens and dictionary_learning")]
pub(crate) struct Args {
    /// A Python that can import sae_lens and dictionary_learning.
    #[arg(long, value_name = "PATH")]
    peer_python: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
}

/// Runs the bench.
pub(crate) fn run(places: &Places, args: &Args) -> Result<()> {
    let mut report = Report::new();
    let data = args.data.ensure(places, &mut report)?;
    let shop = Workshop::open(places, data, "pareto.toml", &STAGES, places.target.join("quality"))?;
    let mut stages = Stages::new(&shop.work, &mut report);
    shop.harvest(&mut stages, TAP, "runs the language model and stores the activations of one layer")?;
    let out = shop.train(&mut stages, &["--tap", TAP])?;
    let tables = shop.configs.values("train")?.get("sae").and_then(toml::Value::as_array);
    let names = tables.into_iter().flatten().filter_map(|sae| sae.get("name")?.as_str());
    let mut saes: Vec<PathBuf> = names.map(|name| out.join(name)).collect();
    let bench = Bench { shop: &shop };
    let peers = match &args.peer_python {
        Some(python) => bench.peers(&mut stages, python)?,
        None => Vec::new(),
    };
    saes.extend(peers.iter().map(|peer| peer.out.clone()));
    let folder = shop.work.join("eval");
    let why = "measures all on held-out text, inside the language model too";
    shop.eval(&mut stages, ("eval", why), &[], &saes, &folder)?;
    show(&folder.join("compare.md"))?;
    println!("plots: {}", folder.join("pareto.svg").display());
    for line in bench.ratios(&saes, &peers)? {
        println!("{line}");
    }
    Ok(())
}

struct Bench<'a> {
    shop: &'a Workshop<'a>,
}

/// An autoencoder of another library.
struct Peer {
    out: PathBuf,
    /// The family of ours that it is compared with.
    variant: String,
}

impl Bench<'_> {
    /// Trains those of the other libraries, one after another.
    fn peers(&self, stages: &mut Stages<'_>, python: &Path) -> Result<Vec<Peer>> {
        let script = self.shop.places.root.join("tests").join("peers").join("train_peers.py");
        let code =
            fs::read_to_string(&script).with_context(|| format!("cannot read {}", script.display()))?;
        let mut peers = Vec::new();
        for (name, settings) in self.shop.configs.values("peers")? {
            let settings = settings.as_table().with_context(|| format!("[peers] {name} must be a table"))?;
            let out = self.shop.work.join("peers").join(name);
            let mut train =
                Program::new(python).arg(&script).arg(self.shop.store()).arg(&out).args(["--tap", TAP]);
            for (key, value) in settings {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                train = train.arg(format!("--{}", key.replace('_', "-"))).arg(value);
            }
            let variant = settings.get("variant").and_then(toml::Value::as_str);
            let variant = variant.with_context(|| format!("[peers] {name} has no variant"))?.to_owned();
            stages.run(name, "another library on the same vectors", &out, false, &[&code], train)?;
            peers.push(Peer { out, variant });
        }
        Ok(peers)
    }

    /// `ratio fvu-PEER X.XX`, to three digits: our FVU at the peer's L0, between the two of ours next to it, over the peer's.
    fn ratios(&self, saes: &[PathBuf], peers: &[Peer]) -> Result<Vec<String>> {
        let mut ours: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for sae in saes.iter().filter(|sae| peers.iter().all(|peer| peer.out != **sae)) {
            let name = name_of(sae);
            let family = name.rsplit_once('-').map_or(name, |(family, _)| family);
            ours.entry(family).or_default().push(self.point(sae)?);
        }
        let mut lines = Vec::new();
        for peer in peers {
            let ((l0, fvu), name) = (self.point(&peer.out)?, name_of(&peer.out));
            let line = ours.get(peer.variant.as_str()).and_then(|points| at(points, l0));
            lines.push(match line {
                Some(our_fvu) => format!("ratio fvu-{name} {:.3}", our_fvu / fvu),
                None => format!("{name}: its L0 of {l0:.1} lies outside those of our {}", peer.variant),
            });
        }
        Ok(lines)
    }

    /// L0 and FVU of an evaluated autoencoder.
    fn point(&self, sae: &Path) -> Result<(f64, f64)> {
        let path = self.shop.work.join("eval").join(name_of(sae)).join("eval.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let report: Value =
            serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
        let number = |key: &str| report["reconstruction"][key].as_f64();
        let point = number("l0").zip(number("fvu"));
        let point = point.with_context(|| format!("{} has no L0 and FVU", path.display()))?;
        ensure!(point.0 > 0.0 && point.1 > 0.0, "{} has an L0 or FVU of zero", path.display());
        Ok(point)
    }
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The FVU of a family at `l0`, straight between its neighbours on logarithmic axes; none outside them.
fn at(points: &[(f64, f64)], l0: f64) -> Option<f64> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points.windows(2).find(|pair| (pair[0].0..=pair[1].0).contains(&l0)).map(|pair| {
        let [(l0_a, fvu_a), (l0_b, fvu_b)] = [pair[0], pair[1]];
        let share = if l0_b > l0_a { (l0 / l0_a).ln() / (l0_b / l0_a).ln() } else { 0.0 };
        (fvu_a.ln() + share * (fvu_b / fvu_a).ln()).exp()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::config;

    #[test]
    fn between_two_points_on_logarithmic_axes() {
        let points = [(40.0, 0.2), (10.0, 0.4), (160.0, 0.1)];
        assert!((at(&points, 20.0).unwrap() - 0.08f64.sqrt()).abs() < 1e-12);
        assert!((at(&points, 40.0).unwrap() - 0.2).abs() < 1e-12);
        assert!((at(&points, 160.0).unwrap() - 0.1).abs() < 1e-12);
        assert!(at(&points, 9.9).is_none() && at(&points, 161.0).is_none());
    }

    #[test]
    fn the_committed_configuration_has_every_stage() {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/pareto.toml");
        let configs = config::split(&source, &STAGES, folder.path()).unwrap();
        let saes = configs.values("train").unwrap()["sae"].as_array().unwrap();
        assert_eq!(saes.len(), 28, "seven variants at four sparsities");
        for (name, peer) in configs.values("peers").unwrap() {
            assert!(peer["variant"].as_str().is_some() && peer["l0"].as_integer().is_some(), "{name}");
        }
        assert!(configs.arguments("eval").unwrap().contains(&"--sequences".to_owned()));
    }
}
