//! `stratascope eval --layers`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shared::format::tensors;
use shared::format::tuned_lens::Lens;
use shared::multi_layer::Layer;

use super::{Args, pretty, write_one};
use crate::evaluate::compare::family;
use crate::evaluate::layers::plots;
use crate::evaluate::layers::{self, LayerReport, LayersReport, Measured, report};
use crate::evaluate::lines::{self, Axis, Line};
use crate::evaluate::{self, EvalReport, Options};
use crate::files;
use crate::lens;
use crate::model::LoadedModel;
use crate::sae_files::SaeFile;
use crate::stop::StopFlag;
use crate::store::Store;

/// Measures and writes each multi-layer autoencoder of `files`, with those of one layer as controls.
pub(super) fn run(
    args: &Args,
    names: Vec<String>,
    files: &[SaeFile],
    store: &Store,
    model: Option<&LoadedModel>,
    options: &Options,
    stop: &StopFlag,
) -> Result<()> {
    let is_control = |file: &SaeFile| file.metadata.layers.is_none() && file.metadata.tap.is_some();
    let (controls, dictionaries): (Vec<_>, Vec<_>) =
        names.into_iter().zip(files).partition(|(_, file)| is_control(file));
    ensure!(!dictionaries.is_empty(), "none of the autoencoders is of several layers; leave --layers out");
    let mut all: Vec<(String, LayersReport)> = Vec::new();
    let alone = dictionaries.len() == 1 && controls.is_empty();
    let lens = args.lens.as_deref().map(lens::read).transpose()?;
    for (name, file) in dictionaries {
        let behind = match &lens {
            Some(lens) => behind(file, lens, store).with_context(|| name.clone())?,
            None => file.clone(),
        };
        let file = &behind;
        let measured = layers::evaluate(file, store, model, options, stop).with_context(|| name.clone())?;
        let folder = if alone { args.out.clone() } else { args.out.join(&name) };
        write_figures(&measured, &folder)?;
        if let Some(model) = model {
            let on_prompt = layers::prompt_use(file, store, model, &args.prompt)?;
            let svg = plots::prompt_svg(&format!("“{}”", args.prompt), &on_prompt)?;
            files::write_bytes(&folder.join("prompt.svg"), svg.as_bytes())?;
        }
        all.push((name, measured.report));
    }
    let (control_names, control_files): (Vec<String>, Vec<SaeFile>) =
        controls.into_iter().map(|(name, file)| (name, file.clone())).unzip();
    let measured = evaluate::evaluate_all(&control_files, store, model, options, stop)?;
    let singles: Vec<(String, EvalReport)> = control_names.into_iter().zip(measured).collect();
    for (name, report) in &singles {
        write_one(report, &args.out.join(name))?;
    }
    files::write_bytes(&args.out.join("layers.svg"), by_layer_svg(&all, &singles)?.as_bytes())?;
    let mut out = std::io::stdout().lock();
    let table = if let ([(_, one)], true) = (&all[..], alone) {
        report::markdown(one)
    } else {
        report::compare(&all, &families(&singles))
    };
    if !alone {
        files::write_bytes(&args.out.join("compare.md"), table.as_bytes())?;
    }
    match (args.json, &all[..]) {
        (false, _) => out.write_all(table.as_bytes())?,
        (true, [(_, one)]) if alone => out.write_all(&pretty(one)?)?,
        (true, _) => {
            for (name, report) in &all {
                writeln!(out, "{}", json!({ "name": name, "report": report }))?;
            }
            for (name, report) in &singles {
                writeln!(out, "{}", json!({ "name": name, "report": report }))?;
            }
        }
    }
    Ok(())
}

/// `file` behind a lens that it does not hold.
fn behind(file: &SaeFile, lens: &Lens, store: &Store) -> Result<SaeFile> {
    let layers = layers::layers_of(file, store)?;
    ensure!(!layers.translated, "it holds a lens of its own; leave --lens out");
    let number = |layer: &Layer| lens.get(layer.tap.layer).cloned();
    let maps: Option<Vec<_>> = layers.layers.iter().map(number).collect();
    let maps = maps.with_context(|| format!("the lens has {} maps, fewer than it has layers", lens.len()))?;
    let mut file = file.clone();
    file.metadata.layers = Some(layers.behind(maps)?);
    Ok(file)
}

fn write_figures(measured: &Measured, folder: &Path) -> Result<()> {
    let Measured { report, layer_use } = measured;
    let title = format!("{}: {} latents over {} layers", report.model, report.n_latents, report.layers.len());
    let svg = |name: &str, svg: String| files::write_bytes(&folder.join(name), svg.as_bytes());
    svg("latents.svg", plots::heat_map_svg(&title, layer_use, 0.0)?)?;
    svg("spread.svg", plots::spread_svg(&title, layer_use)?)?;
    if report.layers.len() > 1 {
        svg("cosine.svg", plots::cosine_svg(report)?)?;
    }
    let shape = [layer_use.n_latents(), layer_use.n_layers()];
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "for reading elsewhere")]
    let (totals, counts): (Vec<f32>, Vec<f32>) = (0..shape[0])
        .flat_map(|latent| layer_use.totals(latent).iter().zip(layer_use.counts(latent)))
        .map(|(&total, &count)| (total as f32, count as f32))
        .unzip();
    let tensors = tensors::serialize(
        "layer_use.safetensors",
        &[("totals", &shape[..], &totals[..]), ("counts", &shape[..], &counts[..])],
    )?;
    files::write_bytes(&folder.join("layer_use.safetensors"), &tensors)?;
    files::write_bytes(&folder.join("layers.md"), report::markdown(report).as_bytes())?;
    files::write_bytes(&folder.join("layers.json"), &pretty(report)?)
}

/// Autoencoders of one layer whose names differ only in it, from the first layer to the last.
fn families(singles: &[(String, EvalReport)]) -> Vec<(String, Vec<&EvalReport>)> {
    let mut families: BTreeMap<&str, Vec<&EvalReport>> = BTreeMap::new();
    for (name, report) in singles {
        families.entry(family(name)).or_default().push(report);
    }
    families.values_mut().for_each(|reports| reports.sort_by_key(|report| report.tap));
    families.into_iter().map(|(name, reports)| (name.to_owned(), reports)).collect()
}

/// FVU, delta loss and KL by layer: a line a multi-layer autoencoder, and a line a family of those of one layer.
fn by_layer_svg(all: &[(String, LayersReport)], singles: &[(String, EvalReport)]) -> Result<String> {
    let lines = |value: fn(&LayerReport) -> Option<f64>,
                 single: fn(&EvalReport) -> Option<f64>|
     -> Vec<Line> {
        let multi = all.iter().map(|(name, report)| {
            let points =
                report.layers.iter().filter_map(|layer| Some((place(layer.tap.layer), value(layer)?)));
            (name.clone(), points.collect())
        });
        let controls = families(singles).into_iter().map(|(name, reports)| {
            let point = |report: &EvalReport| single(report).map(|value| (place(report.tap.layer), value));
            (name, reports.into_iter().filter_map(point).collect())
        });
        multi.chain(controls).collect()
    };
    lines::svg(
        Axis::Layer,
        &[
            ("FVU", lines(|layer| layer.fvu, |report| report.reconstruction.fvu)),
            (
                "delta loss, nats a token",
                lines(
                    |layer| Some(layer.splice.as_ref()?.delta_loss),
                    |report| Some(report.splice.as_ref()?.delta_loss),
                ),
            ),
            ("L0", lines(|layer| Some(layer.l0), |report| Some(report.reconstruction.l0))),
        ],
    )
}

#[expect(clippy::cast_precision_loss, reason = "layers are few")]
fn place(layer: usize) -> f64 {
    layer as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::layers::report::tests::sample;
    use shared::CodesBuilder;
    use shared::format::tensors::TensorFile;
    use shared::metrics::LayerUse;

    fn layer_use() -> LayerUse {
        let codes = |latent: u32, value: f32| {
            let mut builder = CodesBuilder::new(3);
            builder.push(latent, value);
            builder.end_row().unwrap();
            builder.finish()
        };
        let mut layer_use = LayerUse::new(3, 2);
        layer_use.update(&[codes(0, 2.0), codes(2, 0.5)]).unwrap();
        layer_use
    }

    #[test]
    fn everything_measured_is_written() {
        let folder = tempfile::tempdir().unwrap();
        write_figures(&Measured { report: sample(), layer_use: layer_use() }, folder.path()).unwrap();
        for name in ["latents.svg", "spread.svg", "cosine.svg", "layers.md"] {
            assert!(folder.path().join(name).is_file(), "{name}");
        }
        let json = std::fs::read(folder.path().join("layers.json")).unwrap();
        assert_eq!(serde_json::from_slice::<LayersReport>(&json).unwrap(), sample());
        let tensors = std::fs::read(folder.path().join("layer_use.safetensors")).unwrap();
        let tensors = TensorFile::open("layer_use", &tensors).unwrap();
        assert_eq!(tensors.exact("totals", &[3, 2]).unwrap(), [2.0, 0.0, 0.0, 0.0, 0.0, 0.5]);
        assert_eq!(tensors.exact("counts", &[3, 2]).unwrap(), [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        let svg = by_layer_svg(&[("a".to_owned(), sample())], &[]).unwrap();
        assert!(svg.contains("FVU") && svg.contains("L0"));
    }
}
