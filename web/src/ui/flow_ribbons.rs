//! The latents of a token as ribbons through the layers, over a strip of what each layer's reconstruction misses.

use leptos::html;
use leptos::prelude::*;
use web_sys::MouseEvent;

use super::flow::{Chosen, Shown};
use crate::state::figures;
use crate::state::flow_shapes::{COLUMN, HEIGHT, Ribbons};

/// Latents of a layer that are drawn.
const STRONGEST: usize = 10;
/// Height of the strip of errors.
const STRIP: f64 = 60.0;

#[component]
pub(super) fn RibbonCard(shown: Shown, chosen: Chosen) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
    let width = n_layers as f64 * COLUMN;
    let (flow, latents) = (shown.flow.clone(), shown.latents.clone());
    let ribbons = Memo::new(move |_| Ribbons::new(&flow, chosen.token.get(), Some(&latents), STRONGEST));
    let plot: NodeRef<html::Div> = NodeRef::new();
    let block_at = move |event: &MouseEvent| {
        let area = plot.get_untracked()?.get_bounding_client_rect();
        let x = (f64::from(event.client_x()) - area.left()) / area.width().max(1.0) * width;
        let y = (f64::from(event.client_y()) - area.top()) / area.height().max(1.0) * HEIGHT;
        ribbons.with_untracked(|ribbons| ribbons.nearest(x, y).map(|block| (block.layer, block.latent)))
    };
    let all = |path: fn(&Ribbons, Option<u32>) -> String| move || ribbons.with(|ribbons| path(ribbons, None));
    let one = move |path: fn(&Ribbons, Option<u32>) -> String| {
        move || chosen.latent.get().map(|latent| ribbons.with(|ribbons| path(ribbons, Some(latent))))
    };
    #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
    let column = move || chosen.layer.get() as f64 * COLUMN;
    let words = shown.clone();
    let title = move || format!("Token {} {}", chosen.token.get(), words.word(chosen.token.get()));
    let said = shown.clone();
    let label = move || {
        let (layer, token) = (chosen.layer.get(), chosen.token.get());
        let strongest = said.flow.strongest(layer, token);
        let names: Vec<String> = strongest.iter().take(3).map(|(latent, _)| format!("#{latent}")).collect();
        format!(
            "Latents of token {token} through the layers; strongest at layer {}: {}",
            said.layer_name(layer),
            names.join(", ")
        )
    };
    let every = n_layers.div_ceil(16).max(1);
    let names = (0..n_layers).step_by(every).map(|layer| {
        #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
        let left = 100.0 * (layer as f64 + 0.5) / n_layers as f64;
        view! { <span style=format!("left: {left:.2}%")>{shown.layer_name(layer)}</span> }
    });
    let names = names.collect_view();
    view! {
        <section class="card wide" aria-labelledby="h-ribbons">
            <h2 id="h-ribbons">{title}<span class="quiet">" as it flows from layer to layer"</span></h2>
            <div class="scroll-x" tabindex="0" role="region" aria-label="Ribbons">
                <div class="ribbons">
                    <div class="flow-ribbons" id="flow-ribbons" node_ref=plot
                        on:mousemove=move |event| if let Some((layer, latent)) = block_at(&event) { chosen.point(None, Some(layer), Some(latent)) }
                        on:mouseleave=move |_| chosen.point(None, None, None)
                        on:click=move |event| if let Some((layer, latent)) = block_at(&event) { chosen.lock(None, Some(layer), Some(latent)) }>
                        <svg role="img" aria-label=label preserveAspectRatio="none" viewBox=format!("0 0 {width} {HEIGHT}")>
                            <rect class="cross" x=column y="0" width=COLUMN height=HEIGHT></rect>
                            <path class="ribbon" d=all(Ribbons::same_path)></path>
                            <path class="thread" d=all(Ribbons::other_path)></path>
                            <path class="ribbon one" d=one(Ribbons::same_path)></path>
                            <path class="thread one" d=one(Ribbons::other_path)></path>
                            <path class="block" d=all(Ribbons::block_path)></path>
                            <path class="block one" d=one(Ribbons::block_path)></path>
                        </svg>
                    </div>
                    <Errors shown=shown chosen=chosen />
                    <div class="flow-axis-x" aria-hidden="true">{names}</div>
                </div>
            </div>
            <p class="axis-note">
                "Bands: the same latent at the next layer, as high as its activation; the "{STRONGEST}" strongest of each layer. Threads: latents that go together on the corpus, as thick as their cosine: a correlation. Bars: what the reconstruction misses, with a line for the mean of the text."
            </p>
        </section>
    }
}

/// What each layer's reconstruction misses of the token: bars, and the mean over the text as a line.
#[component]
fn Errors(shown: Shown, chosen: Chosen) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
    let width = n_layers as f64 * COLUMN;
    let means = shown.flow.mean_errors();
    let flow = shown.flow.clone();
    let errors = Memo::new(move |_| flow.errors(chosen.token.get()));
    let average = means.clone();
    let top = move || errors.with(|e| e.iter().chain(&average).copied().fold(1e-6, f32::max).min(1.5));
    let (bars_top, line_top) = (top.clone(), top.clone());
    let height = move |value: f32, top: f32| STRIP * f64::from((value / top).min(1.0));
    let bars = move || {
        let top = bars_top();
        let bar = |(layer, &error): (usize, &f32)| {
            #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
            let (x, h) = (layer as f64 * COLUMN + 8.0, height(error, top));
            format!("M{x:.1} {STRIP}v-{h:.1}h{:.1}v{h:.1}z", COLUMN - 16.0)
        };
        errors.with(|errors| errors.iter().enumerate().map(bar).collect::<String>())
    };
    let line = move || {
        let top = line_top();
        let point = |(layer, &mean): (usize, &f32)| {
            #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
            let x = (layer as f64 + 0.5) * COLUMN;
            format!("{}{x:.1} {:.1}", if layer == 0 { "M" } else { "L" }, STRIP - height(mean, top))
        };
        means.iter().enumerate().map(point).collect::<String>()
    };
    let label = move || {
        let worst = errors.with(|e| e.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1)));
        worst.map(|(layer, error)| {
            let layer = shown.layer_name(layer);
            format!(
                "What the reconstruction of the token misses by layer: at most {} at layer {layer}",
                figures::percent(f64::from(error))
            )
        })
    };
    view! {
        <div class="flow-errors">
            <span class="flow-errors-top" aria-hidden="true">{move || figures::percent(f64::from(top()))}" missed"</span>
            <svg role="img" aria-label=label preserveAspectRatio="none" viewBox=format!("0 0 {width} {STRIP}")>
                <path class="missed" d=bars></path>
                <path class="missed-mean" d=line></path>
            </svg>
        </div>
    }
}
