//! Several evaluations side by side: a table, and how much each family of autoencoders loses at each L0.
//!
//! Autoencoders whose names differ only in a number or a tap at the end, such as `topk-20` and `topk-40`, are one family: a line in the
//! plot.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Result, ensure};
use shared::tap::TapPoint;

use super::EvalReport;
use super::lines::{self, Axis, Line};
use super::report::{optional, percent};

/// An evaluation and what its autoencoder is called.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The evaluation.
    pub report: EvalReport,
}

/// The name without the number, or the tap, at its end.
#[must_use]
pub fn family(name: &str) -> &str {
    if let Some((family, tap)) = name.rsplit_once('-')
        && !family.is_empty()
        && tap.parse::<TapPoint>().is_ok()
    {
        return family;
    }
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    match stem.strip_suffix(['-', '_']) {
        Some(family) if stem.len() < name.len() && !family.is_empty() => family,
        _ => name,
    }
}

/// The table, families together, by L0.
#[must_use]
pub fn markdown(all: &[Named]) -> String {
    let mut rows: Vec<&Named> = all.iter().collect();
    let l0 = |named: &Named| named.report.reconstruction.l0;
    rows.sort_by(|a, b| family(&a.name).cmp(family(&b.name)).then(l0(a).total_cmp(&l0(b))));
    let mut out = String::from(
        "| autoencoder | latents | L0 | FVU | delta loss | loss recovered | dead | dense |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for Named { name, report } in rows {
        let r = &report.reconstruction;
        let splice = report.splice.as_ref();
        let delta = splice.map_or_else(String::new, |s| {
            let error = s.delta_loss_error.map_or_else(String::new, |e| format!(" ± {e:.4}"));
            format!("{:.4}{error}", s.delta_loss)
        });
        let recovered = optional(splice.and_then(|s| s.loss_recovered), 4);
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {name} | {} | {:.1} | {} | {delta} | {recovered} | {} | {} |",
            report.n_latents,
            r.l0,
            optional(r.fvu, 4),
            percent(r.dead_share),
            percent(r.dense_share),
        );
    }
    out + "\n![Reconstruction against sparsity](pareto.svg)\n"
}

/// FVU against L0, and delta loss against L0 where it was measured; a line a family.
///
/// # Errors
/// If nothing can be drawn.
pub fn pareto_svg(all: &[Named]) -> Result<String> {
    let fvu = families(all, |report| report.reconstruction.fvu);
    let delta = families(all, |report| report.splice.as_ref().map(|splice| splice.delta_loss));
    ensure!(!fvu.is_empty(), "no autoencoder has an L0 above 0 and an FVU, so there is nothing to draw");
    lines::svg(Axis::L0, &[("FVU", fvu), ("delta loss, nats a token", delta)])
}

/// Per family, `(L0, value)` by L0.
fn families(all: &[Named], value: impl Fn(&EvalReport) -> Option<f64>) -> Vec<Line> {
    let mut families: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for Named { name, report } in all {
        let l0 = report.reconstruction.l0;
        if let Some(value) = value(report).filter(|value| l0 > 0.0 && value.is_finite()) {
            families.entry(family(name)).or_default().push((l0, value));
        }
    }
    families.values_mut().for_each(|points| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    families.into_iter().map(|(name, points)| (name.to_owned(), points)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::reconstruction::ReconstructionReport;
    use super::super::splice::SpliceReport;
    use super::super::{EvalReport, Options};
    use super::*;
    use shared::pack::DensityHistogram;

    fn named(name: &str, l0: f64, fvu: f64, delta: Option<f64>) -> Named {
        let reconstruction = ReconstructionReport {
            n_held_out: 10,
            l0,
            fvu: Some(fvu),
            mean_squared_error: fvu,
            variance: 1.0,
            n_density: 10,
            dead_share: 0.25,
            dense_share: 0.0,
            density_histogram: DensityHistogram { log10_edges: vec![], counts: vec![] },
        };
        let splice = delta.map(|delta_loss| SpliceReport {
            n_sequences: 2,
            n_predictions: 9,
            n_kept: 0,
            ce_clean: 3.0,
            ce_spliced: 3.0 + delta_loss,
            ce_zero: 9.0,
            delta_loss,
            delta_loss_error: None,
            loss_recovered: None,
        });
        let report = EvalReport {
            version: 1,
            model: "m".to_owned(),
            tap: "resid.1".parse().unwrap(),
            target: None,
            d_in: 4,
            n_latents: 8,
            options: Options { sequences: 1, density_tokens: 1 },
            max_input_norm: None,
            n_outliers: 0,
            reconstruction,
            splice,
        };
        Named { name: name.to_owned(), report }
    }

    #[test]
    fn families_are_names_without_their_number() {
        assert_eq!(["single-resid.7", "a-b-mlp.0", "-resid.1"].map(family), ["single", "a-b", "-resid.1"]);
        let names = ["topk-40", "topk_8", "a-0.5", "layer12", "40", "-40", "average_l0_71", "gated"];
        assert_eq!(names.map(family), ["topk", "topk", "a", "layer12", "40", "-40", "average_l0", "gated"]);
    }

    #[test]
    fn a_line_a_family_and_a_row_each() {
        let all = [
            named("topk-40", 40.0, 0.2, Some(0.1)),
            named("gated-20", 19.0, 0.35, Some(0.2)),
            named("topk-20", 20.0, 0.3, Some(0.2)),
        ];
        let svg = pareto_svg(&all).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(
            svg.matches("<circle").count(),
            6 + 2,
            "three marks in each panel, and one a family beside them"
        );
        assert!(svg.contains("FVU") && svg.contains("delta loss"));
        let only_fvu = pareto_svg(&[named("a", 3.0, 0.5, None)]).unwrap();
        assert!(!only_fvu.contains("delta loss"));
        assert!(pareto_svg(&[named("dead", 0.0, 1.0, None)]).is_err());
        let table = markdown(&all);
        let rows: Vec<&str> = table.lines().skip(2).filter_map(|row| row.get(2..9)).collect();
        assert_eq!(rows[..3], ["gated-2", "topk-20", "topk-40"]);
        assert!(table.contains("| topk-20 | 8 | 20.0 | 0.3000 | 0.2000 | – | 25.00 % | 0.00 % |"), "{table}");
    }
}
