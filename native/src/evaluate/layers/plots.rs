//! Plots of a multi-layer SAE: latents over layers, their spread, and figures layer by layer.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use shared::metrics::{LayerUse, profile};

use super::super::lines::{self, Axis, Line};
use super::super::plot::{BAR, GRID, INK};
use super::LayersReport;

/// Columns of a heat map; more latents than that share columns.
const COLUMNS: usize = 480;
/// Shades of a heat map.
const SHADES: usize = 32;
/// Latents whose largest activation on a prompt is not above this are left out of its heat map, as published.
const LEAST_ON_PROMPT: f64 = 1e-3;
/// Bins of the spread histogram.
const BINS: usize = 40;
const PANEL: (u32, u32) = (640, 400);

/// Latents × layers: P(layer | latent) as shade, latents by their mean layer, layers from the bottom up. Each column is the mean
/// of the latents that share it. Latents that were never active, or in none of their sums above `least`, are left out.
///
/// # Errors
/// If no latent was active.
pub fn heat_map_svg(title: &str, layer_use: &LayerUse, least: f64) -> Result<String> {
    let largest = |latent: &usize| layer_use.totals(*latent).iter().copied().fold(0.0, f64::max);
    let alive = (0..layer_use.n_latents()).filter(|latent| largest(latent) > least);
    let mut rows: Vec<Vec<f64>> = alive.filter_map(|latent| layer_use.by_activation(latent)).collect();
    ensure!(!rows.is_empty(), "no latent was active, so there is nothing to draw");
    rows.sort_by(|a, b| profile(a).mean.total_cmp(&profile(b).mean));
    let n_layers = layer_use.n_layers();
    let n_columns = rows.len().min(COLUMNS);
    let column = |i: usize| -> Vec<f64> {
        let (first, end) = (i * rows.len() / n_columns, (i + 1) * rows.len() / n_columns);
        let share = 1.0 / (end - first) as f64;
        (0..n_layers).map(|layer| rows[first..end].iter().map(|row| row[layer] * share).sum()).collect()
    };
    let columns: Vec<Vec<f64>> = (0..n_columns).map(column).collect();
    Ok(raster_svg(title, &format!("{} latents, by mean layer", rows.len()), &columns, n_layers))
}

/// [`heat_map_svg`] of the latents of one prompt.
///
/// # Errors
/// If no latent was active.
pub fn prompt_svg(title: &str, layer_use: &LayerUse) -> Result<String> {
    heat_map_svg(title, layer_use, LEAST_ON_PROMPT)
}

/// Cells of one shade are one path, so that thousands stay small.
fn raster_svg(title: &str, x_title: &str, columns: &[Vec<f64>], n_layers: usize) -> String {
    let (left, top, width, height) = (56.0, 40.0, 720.0, 380.0);
    let (cell_width, cell_height) = (width / columns.len() as f64, height / n_layers as f64);
    let largest = columns.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut paths = vec![String::new(); SHADES];
    let shade = |value: f64| ((value / largest).sqrt() * SHADES as f64).ceil() as usize;
    for layer in 0..n_layers {
        let y = top + height - (layer + 1) as f64 * cell_height;
        let mut start = 0;
        while start < columns.len() {
            let here = shade(columns[start][layer]);
            let run = columns[start..].iter().take_while(|column| shade(column[layer]) == here).count();
            if here > 0 {
                let (x, w) = (left + start as f64 * cell_width, run as f64 * cell_width);
                let path = &mut paths[here.min(SHADES) - 1];
                // Writing to a string cannot fail.
                let _ = write!(path, "M{x:.1} {y:.1}h{w:.1}v{cell_height:.1}h-{w:.1}z");
            }
            start += run;
        }
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" fill=\"#333\">\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/><text x=\"{left}\" y=\"24\" font-size=\"16\">{}</text>",
        left + width + 24.0,
        top + height + 56.0,
        escape(title)
    );
    for (number, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let _ = write!(svg, "<path fill=\"{}\" d=\"{path}\"/>", colour((number + 1) as f64 / SHADES as f64));
    }
    let step = n_layers.div_ceil(10);
    for layer in (0..n_layers).step_by(step) {
        let y = top + height - (layer as f64 + 0.5) * cell_height + 4.0;
        let x = left - 8.0;
        let _ =
            write!(svg, "<text x=\"{x}\" y=\"{y:.1}\" font-size=\"12\" text-anchor=\"end\">{layer}</text>");
    }
    let (middle, bottom) = (left + width / 2.0, top + height);
    let _ = writeln!(
        svg,
        "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#999\"/>\
         <text x=\"{middle}\" y=\"{}\" font-size=\"13\" text-anchor=\"middle\">{} (darkest: P = {largest:.2})</text>\
         <text transform=\"translate(16 {}) rotate(-90)\" font-size=\"13\" text-anchor=\"middle\">layer</text></svg>",
        bottom + 28.0,
        escape(x_title),
        top + height / 2.0
    );
    svg
}

/// From white over blue to nearly black.
fn colour(strength: f64) -> String {
    let stops = [[255.0, 255.0, 255.0], [107.0, 174.0, 214.0], [33.0, 94.0, 168.0], [8.0, 20.0, 60.0]];
    let at = strength.clamp(0.0, 1.0) * 3.0;
    let first = (at as usize).min(2);
    let mix = |i: usize| stops[first][i] + (stops[first + 1][i] - stops[first][i]) * (at - first as f64);
    format!("#{:02x}{:02x}{:02x}", mix(0) as u8, mix(1) as u8, mix(2) as u8)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// How many latents have which standard deviation of the layer, by activation.
///
/// # Errors
/// If no latent was active.
pub fn spread_svg(title: &str, layer_use: &LayerUse) -> Result<String> {
    let deviations: Vec<f64> = (0..layer_use.n_latents())
        .filter_map(|latent| Some(profile(&layer_use.by_activation(latent)?).deviation))
        .collect();
    ensure!(!deviations.is_empty(), "no latent was active, so there is nothing to draw");
    // The largest possible: half at the first layer, half at the last.
    let most = (layer_use.n_layers().saturating_sub(1) as f64 / 2.0).max(0.5);
    let mut counts = [0u64; BINS];
    for deviation in deviations {
        counts[((deviation / most * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let highest = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, PANEL).into_drawing_area();
        area.fill(&WHITE).context("cannot draw the plot")?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .caption(title, ("sans-serif", 16, &INK))
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..most, 0..highest + highest.div_ceil(12))
            .context("cannot draw the axes")?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(("sans-serif", 13, &INK))
            .x_desc("standard deviation of the layer, in layers")
            .y_desc("latents")
            .draw()
            .context("cannot draw the axes")?;
        let width = most / BINS as f64;
        let bars = counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(bin, &count)| {
            let left = bin as f64 * width;
            Rectangle::new([(left + 0.06 * width, 0), (left + 0.94 * width, count)], BAR.filled())
        });
        chart.draw_series(bars).context("cannot draw the bars")?;
        area.present().context("cannot finish the plot")?;
    }
    Ok(svg)
}

/// The cosine of each layer's vectors with the next layer's, and the latents they have in common.
///
/// # Errors
/// If drawing fails.
pub fn cosine_svg(report: &LayersReport) -> Result<String> {
    let line = |name: &str, value: fn(&super::PairReport) -> Option<f64>| -> Line {
        let points = report.pairs.iter().enumerate();
        (name.to_owned(), points.filter_map(|(i, pair)| Some((i as f64, value(pair)?))).collect())
    };
    let vectors =
        vec![line("cosine", |pair| pair.cosine), line("cosine, less the means", |pair| pair.centred_cosine)];
    let latents = vec![
        line("active at both, on a token", |pair| pair.token_overlap),
        line("shared activation, over tokens", |pair| pair.shared_use),
    ];
    let panels = [("vectors of a layer and the next", vectors), ("latents of a layer and the next", latents)];
    lines::svg(Axis::Layer, &panels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::CodesBuilder;

    /// Latent 0 at the first layer, latent 1 at the second, latent 2 at both, latent 3 never.
    fn layer_use() -> LayerUse {
        let codes = |latents: &[u32]| {
            let mut builder = CodesBuilder::new(4);
            latents.iter().for_each(|&latent| builder.push(latent, 2.0));
            builder.end_row().unwrap();
            builder.finish()
        };
        let mut layer_use = LayerUse::new(4, 2);
        layer_use.update(&[codes(&[0, 2]), codes(&[1, 2])]).unwrap();
        layer_use
    }

    #[test]
    fn a_heat_map_has_a_cell_for_what_is_active() {
        let svg = heat_map_svg("a <b>", &layer_use(), 0.0).unwrap();
        assert!(svg.contains("a &lt;b&gt;") && svg.contains("3 latents, by mean layer"));
        // Two latents at one layer each, darkest; one at both, paler.
        assert_eq!(svg.matches("M").count(), 4);
        assert_eq!(svg.matches("<path").count(), 2);
        assert!(prompt_svg("p", &LayerUse::new(4, 2)).is_err());
        assert!(heat_map_svg("p", &layer_use(), 2.0).is_err(), "none above");
    }

    #[test]
    fn the_histogram_counts_latents_by_spread() {
        let svg = spread_svg("spread", &layer_use()).unwrap();
        assert_eq!(svg.matches("fill=\"#2F6FB7\"").count(), 2);
        assert!(spread_svg("none", &LayerUse::new(4, 2)).is_err());
    }
}
