//! A multi-layer evaluation for people: `layers.md`, and the table that compares several.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use shared::tap::TapPoint;

use super::super::EvalReport;
use super::super::report::{optional, percent};
use super::{LayerReport, LayersReport};

/// The report as Markdown.
#[must_use]
pub fn markdown(report: &LayersReport) -> String {
    let (n, spread) = (report.layers.len(), &report.spread);
    let mut out = format!("# {}, {n} layers ({} latents)\n\n", report.model, report.n_latents);
    let mut rows = vec![
        (
            "L0",
            format!("{:.2}", mean(report, |layer| Some(layer.l0))),
            format!("mean over layers, {} held-out tokens", report.n_tokens),
        ),
        ("FVU", format!("{:.4}", mean(report, |layer| layer.fvu)), "mean over layers".to_owned()),
        ("dead latents", percent(spread.dead_share), "never active at any layer".to_owned()),
        (
            "MMCS",
            format!("{:.4}", report.mmcs),
            "mean of the largest cosine with another latent's direction".to_owned(),
        ),
        (
            "layers a latent",
            format!("{:.2}", spread.layers_by_count),
            format!(
                "active there on at least one token in a thousand; {:.2} hold at least 1 % of its activation",
                spread.layers_by_share
            ),
        ),
        (
            "spread",
            format!("{:.3}", spread.by_activation.deviation),
            format!(
                "mean standard deviation of the layer: {:.3} of {n} layers",
                spread.by_activation.relative_deviation
            ),
        ),
        (
            "entropy",
            format!("{:.3}", spread.by_activation.entropy),
            format!(
                "nats, mean of P(layer \\| latent): {:.3} of the largest",
                spread.by_activation.relative_entropy
            ),
        ),
    ];
    if report.layers.iter().any(|layer| layer.fvu_translated.is_some()) {
        let found = format!("{:.4}", mean(report, |layer| layer.fvu_translated));
        rows.push(("FVU behind the lens", found, "mean over layers, before the lens is undone".to_owned()));
    }
    if let Some(found) = report.on_token {
        let about = format!(
            "layers at which a latent is active on a token where it is at all; {} of such pairs are of a single layer, with {} of all activation",
            percent(found.single),
            percent(found.single_weighted)
        );
        rows.push(("layers on a token", format!("{:.2}", found.layers), about));
    }
    if let Some(correlation) = report.cosine_overlap_correlation {
        let about =
            "over neighbouring layers, of centred cosine and of latents in common on a token".to_owned();
        rows.push(("correlation", format!("{correlation:.3}"), about));
    }
    out.push_str("| metric | value | of |\n|---|---:|---|\n");
    for (metric, value, about) in rows {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| {metric} | {value} | {about} |");
    }
    out.push_str("\n## Variance of the layer\n\n| | Var(L) | E[Var(L \\| J)] | E[Var(L \\| J, T)] | of latents | of tokens |\n|---|---:|---:|---:|---:|---:|\n");
    for (name, found) in [("weighted by activation", report.weighted), ("as published", report.published)] {
        if let Some(found) = found {
            let _ = writeln!(
                out,
                "| {name} | {} | {} | {} | {} | {} |",
                short(found.total),
                short(found.latent),
                short(found.token),
                short(found.latent_ratio),
                short(found.token_ratio)
            );
        }
    }
    out.push_str("\nOf latents: E[Var(L \\| J)] / Var(L). Of tokens: E[Var(L \\| J, T)] / E[Var(L \\| J)], small when a latent is at one layer on a token and at others on other tokens.\n");
    out.push_str("\n## Layer by layer\n\n| layer | L0 | FVU | dead here | delta loss | KL | cosine with the next | centred | latents in common |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n");
    for (i, layer) in report.layers.iter().enumerate() {
        let pair = report.pairs.get(i);
        let _ = writeln!(
            out,
            "| {} | {:.1} | {} | {} | {} | {} | {} | {} | {} |",
            layer.tap,
            layer.l0,
            optional(layer.fvu, 4),
            percent(layer.dead_share),
            optional(layer.splice.as_ref().map(|splice| splice.delta_loss), 4),
            optional(layer.splice.as_ref().map(|splice| splice.kl), 4),
            optional(pair.and_then(|pair| pair.cosine), 3),
            optional(pair.and_then(|pair| pair.centred_cosine), 3),
            optional(pair.and_then(|pair| pair.token_overlap), 3),
        );
    }
    let outliers: u64 = report.layers.iter().map(|layer| layer.n_outliers).sum();
    if outliers > 0 {
        let all = report.n_tokens * n as u64;
        let _ = writeln!(
            out,
            "\n{outliers} of {all} vectors are longer than what was trained on and are not measured."
        );
    }
    out.push_str("\n![Latents by layer](latents.svg)\n\n![Spread of latents](spread.svg)\n\n![Neighbouring layers](cosine.svg)\n");
    out
}

/// A row each, and FVU and L0 layer by layer beside those of autoencoders of one layer: `singles` are families of such, each a report a
/// layer.
#[must_use]
pub fn compare(all: &[(String, LayersReport)], singles: &[(String, Vec<&EvalReport>)]) -> String {
    summary(all) + &by_layer(all, singles)
}

/// FVU and L0 of every layer, a column an autoencoder.
fn by_layer(all: &[(String, LayersReport)], singles: &[(String, Vec<&EvalReport>)]) -> String {
    let mut columns: Vec<(&str, BTreeMap<TapPoint, String>)> = Vec::new();
    let cell = |fvu: Option<f64>, l0: f64| format!("{} ({l0:.0})", optional(fvu, 3));
    for (name, report) in all {
        let cells = report.layers.iter().map(|layer| (layer.tap, cell(layer.fvu, layer.l0)));
        columns.push((name, cells.collect()));
    }
    for (name, reports) in singles {
        let measured = reports.iter().map(|report| (report.tap, &report.reconstruction));
        columns.push((name, measured.map(|(tap, found)| (tap, cell(found.fvu, found.l0))).collect()));
    }
    let taps: BTreeSet<TapPoint> = columns.iter().flat_map(|(_, cells)| cells.keys().copied()).collect();
    let names: String = columns.iter().map(|(name, _)| format!(" {name} |")).collect();
    let mut out =
        format!("\nFVU (L0) of every layer:\n\n| layer |{names}\n|---|{}\n", "---:|".repeat(columns.len()));
    for tap in taps {
        let cells: String = columns
            .iter()
            .map(|(_, cells)| format!(" {} |", cells.get(&tap).map_or("–", String::as_str)))
            .collect();
        // Writing to a string cannot fail.
        let _ = writeln!(out, "| {tap} |{cells}");
    }
    out
}

/// A row each.
fn summary(all: &[(String, LayersReport)]) -> String {
    let mut out = String::from(
        "| autoencoder | latents | L0 | FVU | delta loss | KL | dead | layers a latent | on a token | single | spread | of latents | of tokens | as published | MMCS |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for (name, report) in all {
        let spliced = |value: fn(&LayerReport) -> Option<f64>| {
            let any = report.layers.iter().any(|layer| value(layer).is_some());
            optional(any.then(|| mean(report, value)), 4)
        };
        let _ = writeln!(
            out,
            "| {name} | {} | {:.1} | {:.4} | {} | {} | {} | {:.2} | {} | {} | {:.2} | {} | {} | {} | {:.3} |",
            report.n_latents,
            mean(report, |layer| Some(layer.l0)),
            mean(report, |layer| layer.fvu),
            spliced(|layer| Some(layer.splice.as_ref()?.delta_loss)),
            spliced(|layer| Some(layer.splice.as_ref()?.kl)),
            percent(report.spread.dead_share),
            report.spread.layers_by_count,
            optional(report.on_token.map(|found| found.layers), 2),
            report.on_token.map_or_else(|| "–".to_owned(), |found| percent(found.single)),
            report.spread.by_activation.deviation,
            optional(report.weighted.map(|found| found.latent_ratio), 3),
            optional(report.weighted.map(|found| found.token_ratio), 3),
            optional(report.published.map(|found| found.token_ratio), 4),
            report.mmcs,
        );
    }
    out + "\nMeans over layers. On a token: layers at which a latent is active on a token where it is at all; single: share of such pairs at one layer. Of latents: E[Var(L \\| J)] / Var(L); of tokens: E[Var(L \\| J, T)] / E[Var(L \\| J)], weighted by activation, and with the published program's means.\n\n![Layer by layer](layers.svg)\n"
}

/// The mean over the layers that have the value.
fn mean(report: &LayersReport, value: impl Fn(&LayerReport) -> Option<f64>) -> f64 {
    super::mean(report.layers.iter().filter_map(value))
}

/// Four significant digits.
fn short(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:.3e}") } else { format!("{value:.4}") }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::splice::LayerSplice;
    use super::super::{PairReport, Spread, SpreadMeans};
    use super::*;
    use crate::evaluate::Options;
    use shared::metrics::Decomposition;
    use shared::metrics::OnToken;

    /// Two layers, of which one was spliced.
    pub(crate) fn sample() -> LayersReport {
        let layer = |tap: &str, l0: f64, fvu: Option<f64>, delta_loss: Option<f64>| LayerReport {
            tap: tap.parse().unwrap(),
            scale: 2.0,
            n_vectors: 9,
            n_outliers: u64::from(fvu.is_none()),
            l0,
            fvu,
            fvu_translated: None,
            dead_share: 0.25,
            splice: delta_loss.map(|delta_loss| LayerSplice {
                n_predictions: 8,
                ce_clean: 3.0,
                delta_loss,
                delta_loss_error: None,
                kl: 0.125,
            }),
        };
        let means =
            SpreadMeans { deviation: 0.5, relative_deviation: 0.25, entropy: 0.3, relative_entropy: 0.4 };
        let [total, latent, token] = [0.25, 0.2, 0.0002];
        LayersReport {
            version: 1,
            model: "tiny".to_owned(),
            d_in: 4,
            n_latents: 3,
            options: Options { sequences: 2, density_tokens: 0 },
            n_tokens: 10,
            layers: vec![layer("resid.0", 2.0, Some(0.5), Some(0.75)), layer("resid.1", 4.0, None, None)],
            pairs: vec![PairReport {
                from: "resid.0".parse().unwrap(),
                to: "resid.1".parse().unwrap(),
                cosine: Some(0.9),
                centred_cosine: Some(0.8),
                token_overlap: Some(0.7),
                shared_use: Some(0.6),
            }],
            spread: Spread {
                n_alive: 2,
                dead_share: 1.0 / 3.0,
                by_activation: means,
                by_count: means,
                layers_by_count: 1.5,
                layers_by_share: 1.25,
            },
            weighted: Some(Decomposition { total, latent, token, latent_ratio: 0.8, token_ratio: 0.001 }),
            published: None,
            on_token: Some(OnToken { pairs: 4, layers: 1.25, single: 0.75, single_weighted: 0.5 }),
            mmcs: 0.5,
            cosine_overlap_correlation: None,
        }
    }

    #[test]
    fn every_layer_has_a_row_and_what_is_missing_a_dash() {
        let text = markdown(&sample());
        assert!(
            text.contains("| resid.0 | 2.0 | 0.5000 | 25.00 % | 0.7500 | 0.1250 | 0.900 | 0.800 | 0.700 |"),
            "{text}"
        );
        assert!(text.contains("| resid.1 | 4.0 | – | 25.00 % | – | – | – | – | – |"));
        assert!(text.contains("| L0 | 3.00 |") && text.contains("| FVU | 0.5000 |"));
        assert!(text.contains("| weighted by activation | 0.2500 | 0.2000 | 2.000e-4 | 0.8000 | 0.0010 |"));
        assert!(text.contains("| layers on a token | 1.25 |") && text.contains("; 75.00 % of such pairs"));
        assert!(!text.contains("as published |") && !text.contains("| correlation |"));
        assert!(text.contains("1 of 20 vectors are longer"));
        let table = compare(&[("a".to_owned(), sample())], &[("b".to_owned(), Vec::new())]);
        assert!(
            table.contains("| layer | a | b |") && table.contains("| resid.0 | 0.500 (2) | – |"),
            "{table}"
        );
        assert!(
            table.contains(
                "| a | 3 | 3.0 | 0.5000 | 0.7500 | 0.1250 | 33.33 % | 1.50 | 1.25 | 75.00 % | 0.50 | 0.800 | 0.001 | – | 0.500 |"
            ),
            "{table}"
        );
    }
}
