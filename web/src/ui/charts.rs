//! Histograms as SVG, each with a sentence that says the same.

use leptos::prelude::*;
use shared::pack::DensityHistogram;

use crate::state::chart::{self, Bar};
use crate::state::list::DENSE;
use crate::state::{figures, words};

fn rects(bars: Vec<Bar>) -> impl IntoView {
    bars.into_iter()
        .filter(|bar| bar.count > 0)
        .map(|bar| {
            let (x, width) = (1000.0 * bar.x + 1.0, (1000.0 * bar.width - 2.0).max(1.0));
            let height = 200.0 * bar.height;
            view! { <rect x=x y=200.0 - height width=width height=height></rect> }
        })
        .collect_view()
}

/// Lines at powers of ten, with their labels.
fn grid(counts: &[u64]) -> (impl IntoView + use<>, impl IntoView + use<>) {
    let top = chart::log_top(counts);
    let ticks = chart::log_ticks(counts);
    let heights: Vec<(u64, f64)> = ticks.into_iter().map(|t| (t, chart::log_height(t, top))).collect();
    let lines = heights
        .iter()
        .map(|&(_, h)| view! { <line class="grid" x1="0" x2="1000" y1=200.0 - 200.0 * h y2=200.0 - 200.0 * h></line> })
        .collect_view();
    let labels = heights
        .iter()
        .map(|&(tick, h)| {
            let label =
                if tick < 1000 { tick.to_string() } else { format!("10{}", superscript(tick.ilog10())) };
            view! { <span style=format!("bottom: {:.1}%", 100.0 * h)>{label}</span> }
        })
        .collect_view();
    (lines, labels)
}

fn superscript(n: u32) -> String {
    n.to_string().chars().filter_map(|c| "⁰¹²³⁴⁵⁶⁷⁸⁹".chars().nth(c.to_digit(10)? as usize)).collect()
}

/// How often a latent is how active: logarithmic height, forty bins up to its maximum.
#[component]
pub(crate) fn ActivationHistogram(counts: Vec<u32>, max: f32) -> impl IntoView {
    let counts: Vec<u64> = counts.into_iter().map(u64::from).collect();
    let total: u64 = counts.iter().sum();
    let label = format!(
        "Histogram of activations: {} tokens in {} bins from 0 to {}; {} in the lowest bin, {} in the highest.",
        figures::count(total),
        counts.len(),
        figures::value(f64::from(max)),
        counts.first().copied().unwrap_or(0),
        counts.last().copied().unwrap_or(0)
    );
    let (lines, labels) = grid(&counts);
    view! {
        <div class="chart">
            <div class="axis-y" aria-hidden="true">{labels}</div>
            <svg role="img" aria-label=label viewBox="0 0 1000 200" preserveAspectRatio="none">
                {lines}
                <g class="bars">{rects(chart::log_bars(&counts))}</g>
            </svg>
            <div class="axis-x" aria-hidden="true">
                <span>"0"</span>
                <span>"activation"</span>
                <span>{figures::value(f64::from(max))}</span>
            </div>
        </div>
    }
}

/// How dense all latents are, on a logarithmic axis, with a mark for one of them.
#[component]
pub(crate) fn Densities(
    histogram: DensityHistogram,
    /// The density to mark.
    #[prop(optional)]
    mark: Option<f32>,
) -> impl IntoView {
    let DensityHistogram { log10_edges: edges, counts } = histogram;
    let total: u64 = counts.iter().sum();
    let label = format!("Histogram of the firing densities of {} latents that fired.", figures::count(total));
    let place = mark.and_then(|d| chart::log_position(f64::from(d), &edges));
    let dense = chart::log_position(f64::from(DENSE), &edges).unwrap_or(1.0);
    let ends = edges.first().copied().zip(edges.last().copied()).unwrap_or((-7.0, 0.0));
    #[expect(clippy::cast_possible_truncation, reason = "a few decades")]
    let ticks: Vec<(i32, f64)> = (ends.0.ceil() as i32..=ends.1.floor() as i32)
        .filter(|t| t % 2 == 0)
        .filter_map(|t| Some((t, chart::log_position(10f64.powi(t), &edges)?)))
        .collect();
    let (lines, labels) = grid(&counts);
    view! {
        <div class="chart">
            <div class="axis-y" aria-hidden="true">{labels}</div>
            <svg role="img" aria-label=label viewBox="0 0 1000 200" preserveAspectRatio="none">
                <rect class="zone" x=1000.0 * dense y="0" width=1000.0 * (1.0 - dense) height="200"></rect>
                {lines}
                <g class="bars quiet">{rects(chart::log_bars(&counts))}</g>
                {place.map(|x| view! { <line class="mark" x1=1000.0 * x x2=1000.0 * x y1="0" y2="200"></line> })}
            </svg>
            <div class="axis-x ticks" aria-hidden="true">
                {ticks
                    .into_iter()
                    .map(|(t, x)| {
                        let sign = if t < 0 { "⁻" } else { "" };
                        let name = if t == 0 { "1".to_owned() } else { format!("10{sign}{}", superscript(t.unsigned_abs())) };
                        view! { <span style=format!("left: {:.2}%", 100.0 * x)>{name}</span> }
                    })
                    .collect_view()}
            </div>
        </div>
    }
}

/// Tokens whose logits a latent raises or lowers, as bars that share one scale.
#[component]
pub(crate) fn Logits(
    title: &'static str,
    rows: Vec<(String, f32)>,
    scale: f32,
    negative: bool,
) -> impl IntoView {
    view! {
        <table class="logits" class:negative=negative>
            <caption>{title}</caption>
            <tbody>
                {rows
                    .into_iter()
                    .map(|(word, value)| {
                        let width = if scale > 0.0 { 100.0 * (value.abs() / scale).min(1.0) } else { 0.0 };
                        view! {
                            <tr>
                                <th scope="row"><span class="word">{words::alone(&word)}</span></th>
                                <td class="meter"><span style=format!("width: {width:.1}%")></span></td>
                                <td class="number">{format!("{value:+.3}")}</td>
                            </tr>
                        }
                    })
                    .collect_view()}
            </tbody>
        </table>
    }
}
