//! Several evaluations side by side: a table, and how much each family of autoencoders loses at each L0.
//!
//! Autoencoders whose names differ only in a number or a tap at the end, such as `topk-20` and `topk-40`, are one family: a line in the
//! plot.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::*;
use shared::tap::TapPoint;

use super::EvalReport;
use super::plot::{GRID, INK};
use super::report::{optional, percent};

const PANEL: (u32, u32) = (480, 400);
/// Width of the names beside the panels.
const LEGEND: u32 = 240;
/// Wong's colours for the colour-blind (Nature Methods 8, 441), without yellow, which is lost on white.
pub(super) const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(51, 51, 51),
];
/// L0s named on the axis, as far as they lie in the plot.
const TICKS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];

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
    let panels: Vec<_> = [("FVU", fvu), ("delta loss, nats a token", delta)]
        .into_iter()
        .filter(|(_, families)| !families.is_empty())
        .collect();
    ensure!(!panels.is_empty(), "no autoencoder has an L0 above 0 and an FVU, so there is nothing to draw");
    let names: Vec<&str> = {
        let mut names: Vec<&str> = all.iter().map(|named| family(&named.name)).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let mut svg = String::new();
    {
        let width = PANEL.0 * panels.len() as u32;
        let area = SVGBackend::with_string(&mut svg, (width + LEGEND, PANEL.1)).into_drawing_area();
        area.fill(&WHITE).context("cannot draw the plot")?;
        // The names stand beside the panels, where they cover nothing.
        let (drawn, named) = area.split_horizontally(width);
        for (part, (title, families)) in drawn.split_evenly((1, panels.len())).iter().zip(&panels) {
            panel(part, title, families, &names)?;
        }
        legend(&named, &names)?;
        area.present().context("cannot finish the plot")?;
    }
    Ok(svg)
}

type Families<'a> = BTreeMap<&'a str, Vec<(f64, f64)>>;

/// Per family, `(L0, value)` by L0.
fn families(all: &[Named], value: impl Fn(&EvalReport) -> Option<f64>) -> Families<'_> {
    let mut families = Families::new();
    for Named { name, report } in all {
        let l0 = report.reconstruction.l0;
        if let Some(value) = value(report).filter(|value| l0 > 0.0 && value.is_finite()) {
            families.entry(family(name)).or_default().push((l0, value));
        }
    }
    families.values_mut().for_each(|points| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    families
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    families: &Families<'_>,
    names: &[&str],
) -> Result<()> {
    let points = || families.values().flatten();
    let (mut low, mut high) =
        points().fold((f64::INFINITY, 0.0f64), |(low, high), (l0, _)| (low.min(*l0), high.max(*l0)));
    (low, high) = (low / 1.15, high * 1.15);
    let top = points().map(|(_, value)| *value).fold(0.0, f64::max) * 1.08;
    let bottom = points().map(|(_, value)| *value).fold(0.0, f64::min);
    let ticks = TICKS.into_iter().filter(|tick| (low..high).contains(tick)).collect();
    let mut chart = ChartBuilder::on(area)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((low..high).log_scale().with_key_points(ticks), bottom..top.max(1e-9))
        .context("cannot draw the axes")?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13, &INK))
        .x_desc("L0, mean active latents a token")
        .y_desc(title)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()
        .context("cannot draw the axes")?;
    for (name, points) in families {
        let look = Look::of(names.iter().position(|known| known == name).unwrap_or(0));
        let line = points.iter().copied();
        if look.hollow {
            let dashes = DashedLineSeries::new(line, 6, 4, look.colour.stroke_width(2));
            chart.draw_series(dashes).context("cannot draw a line")?;
        } else {
            let whole = LineSeries::new(line, look.colour.stroke_width(2));
            chart.draw_series(whole).context("cannot draw a line")?;
        }
        let marks = points.iter().map(|&point| Circle::new(point, 4, look.mark()));
        chart.draw_series(marks).context("cannot draw the marks")?;
    }
    Ok(())
}

/// How a family is drawn: after as many as there are colours, dashed and hollow.
struct Look {
    colour: RGBColor,
    hollow: bool,
}

impl Look {
    fn of(family: usize) -> Self {
        Self { colour: COLOURS[family % COLOURS.len()], hollow: family >= COLOURS.len() }
    }

    fn mark(&self) -> ShapeStyle {
        if self.hollow { self.colour.stroke_width(2) } else { self.colour.filled() }
    }
}

/// The names of the families, each with its line and mark.
fn legend(area: &DrawingArea<SVGBackend<'_>, Shift>, names: &[&str]) -> Result<()> {
    for (i, name) in names.iter().enumerate() {
        let (look, y) = (Look::of(i), 32 + 22 * i32::try_from(i)?);
        let pieces = if look.hollow { vec![(0, 8), (22, 30)] } else { vec![(0, 30)] };
        for (from, to) in pieces {
            let line = PathElement::new([(from, y), (to, y)], look.colour.stroke_width(2));
            area.draw(&line).context("cannot draw the legend")?;
        }
        area.draw(&Circle::new((15, y), 4, look.mark())).context("cannot draw the legend")?;
        let style = ("sans-serif", 13, &INK).into_text_style(area);
        area.draw(&Text::new((*name).to_owned(), (38, y - 7), style)).context("cannot draw the legend")?;
    }
    Ok(())
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
