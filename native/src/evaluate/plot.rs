//! The density histogram as an SVG that needs no font of its own.

use anyhow::{Context, Result};
use plotters::prelude::*;
use shared::pack::DensityHistogram;

const SIZE: (u32, u32) = (760, 420);
pub(super) const BAR: RGBColor = RGBColor(47, 111, 183);
pub(super) const INK: RGBColor = RGBColor(51, 51, 51);
pub(super) const GRID: RGBColor = RGBColor(225, 225, 225);

/// Latents by `log10(density)`; `dead_share` goes into the caption because dead latents are in no bin.
///
/// # Errors
/// If the histogram has no bins or drawing fails.
pub fn density_svg(title: &str, histogram: &DensityHistogram, dead_share: f64) -> Result<String> {
    let (edges, counts) = (&histogram.log10_edges, &histogram.counts);
    let (Some(&low), Some(&high)) = (edges.first(), edges.last()) else {
        anyhow::bail!("the density histogram has no bins");
    };
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).context("cannot draw the plot")?;
        let caption = format!("{title}: firing density of latents ({:.1} % dead)", 100.0 * dead_share);
        let headroom = most + most.div_ceil(12);
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .caption(caption, ("sans-serif", 17, &INK))
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(low..high, 0..headroom)
            .context("cannot draw the axes")?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(("sans-serif", 13, &INK))
            .x_desc("log10(share of tokens on which a latent is active)")
            .y_desc("latents")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .draw()
            .context("cannot draw the axes")?;
        let bars = edges.windows(2).zip(counts).filter(|(_, count)| **count > 0).map(|(edge, &count)| {
            let gap = 0.06 * (edge[1] - edge[0]);
            Rectangle::new([(edge[0] + gap, 0), (edge[1] - gap, count)], BAR.filled())
        });
        chart.draw_series(bars).context("cannot draw the bars")?;
        area.present().context("cannot finish the plot")?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bar_a_filled_bin() {
        let histogram = DensityHistogram { log10_edges: vec![-3.0, -2.0, -1.0, 0.0], counts: vec![4, 0, 9] };
        let svg = density_svg("tiny", &histogram, 0.25).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("fill=\"#2F6FB7\"").count(), 2);
        assert!(svg.contains("tiny: firing density of latents (25.0 % dead)"));
        let empty = DensityHistogram { log10_edges: vec![], counts: vec![] };
        assert!(density_svg("", &empty, 0.0).is_err());
    }
}
