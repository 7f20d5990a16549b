//! What is known about a latent across the layers: where it is active, what it says at each layer, what goes with it, and what
//! changes without it.

use std::sync::Arc;

use leptos::prelude::*;
use shared::metrics::profile;
use shared::pack::FeatureShard;
use shared::pack::flow::{Effect, FlowLatents, LensShard, Transition};

use super::context::{ctx, load};
use super::flow::{Chosen, Shown};
use super::parts::{Words, when};
use crate::data;
use crate::state::address::Route;
use crate::state::{figures, words};

/// What was fetched of a latent.
#[derive(Clone)]
struct Known {
    latent: u32,
    feature: (Arc<FeatureShard>, usize),
    /// Its place among the described latents, and its lens.
    described: Option<(usize, Arc<LensShard>, usize)>,
}

#[component]
pub(super) fn Panel(shown: Shown, chosen: Chosen, latent: RwSignal<Option<u32>>) -> impl IntoView {
    let from = shown.clone();
    let known = load(
        move || latent.get(),
        move |latent| {
            let (pack, latents) = (from.pack.clone(), from.latents.clone());
            async move {
                let Some(latent) = latent else { return Ok(None) };
                let feature = data::shard(&pack, latent).await?;
                let described = match latents.find(latent) {
                    Some(place) => {
                        let (lens, within) = data::lens(&pack, place).await?;
                        Some((place, lens, within))
                    }
                    None => None,
                };
                Ok(Some(Known { latent, feature, described }))
            }
        },
    );
    view! {
        {move || {
            when(known.get(), |known: Option<Known>| match known {
                Some(known) => view! { <About shown=shown.clone() chosen=chosen known=known /> }.into_any(),
                None => view! { <p class="quiet">"Nothing is active here."</p> }.into_any(),
            })
        }}
    }
}

#[component]
fn About(shown: Shown, chosen: Chosen, known: Known) -> impl IntoView {
    let ctx = ctx();
    let latent = known.latent;
    let route = Route::feature(&shown.pack.entry.name, latent);
    let fires_on = shown.index.top_tokens.get(latent as usize).cloned().unwrap_or_default();
    let effect = shown.flow.effect(latent).cloned();
    let at = effect.as_ref().map(|effect| usize::from(effect.layer));
    view! {
        <h2 class="flow-about" id="h-about">
            "Latent "<a href=move || ctx.href(route.clone())>"#"{latent}</a>
            <span class="quiet">" fires on "</span><Words words=fires_on />
        </h2>
        <div class="flow-panel" id="flow-panel" data-latent=latent.to_string()>
            <Layers shown=shown.clone() chosen=chosen known=known.clone() />
            <Lens shown=shown.clone() chosen=chosen known=known.clone() />
            <GoesWith shown=shown.clone() chosen=chosen known=known.clone() fixed=at />
            <Causes shown=shown.clone() effect=effect />
            <Near shown=shown known=known />
        </div>
    }
}

const NOT_DESCRIBED: &str =
    "The pack describes the most active latents of its texts, and this is not one of them.";

/// P(layer | latent) over the corpus.
#[component]
fn Layers(shown: Shown, chosen: Chosen, known: Known) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    let totals = known.described.as_ref().map(|(place, ..)| {
        let FlowLatents { totals, .. } = &*shown.latents;
        totals[place * n_layers..(place + 1) * n_layers].iter().map(|&t| f64::from(t)).collect::<Vec<f64>>()
    });
    let body = match totals {
        Some(totals) if totals.iter().sum::<f64>() > 0.0 => {
            let sum: f64 = totals.iter().sum();
            let shares: Vec<f64> = totals.iter().map(|t| t / sum).collect();
            let about = profile(&shares);
            let top = shares.iter().copied().fold(0.0, f64::max);
            let n_active = shares.iter().filter(|share| **share >= 0.01).count();
            let label = format!(
                "Share of its activation at each layer: mean layer {:.1}, deviation {:.1}, {n_active} layers with at least one percent",
                about.mean, about.deviation
            );
            let bars = shares.iter().enumerate().map(|(layer, share)| {
                let height = 100.0 * share / top;
                let here = move || chosen.layer.get() == layer;
                view! { <rect class:here=here x=layer as f64 + 0.1 y=100.0 - height width="0.8" height=height></rect> }
            });
            let last = n_layers.saturating_sub(1);
            view! {
                <svg class="flow-layers" role="img" aria-label=label preserveAspectRatio="none" viewBox=format!("0 0 {n_layers} 100")>
                    <g class="bars">{bars.collect_view()}</g>
                </svg>
                <div class="axis-x" aria-hidden="true"><span>{shown.layer_name(0)}</span><span>"layer"</span><span>{shown.layer_name(last)}</span></div>
                <p class="axis-note">
                    {format!("mean layer {:.1} ± {:.1}; {n_active} layers with 1 % or more of its activation", about.mean, about.deviation)}
                </p>
            }
            .into_any()
        }
        _ => view! { <p class="quiet">{NOT_DESCRIBED}</p> }.into_any(),
    };
    view! {
        <section class="card" aria-labelledby="h-layers">
            <h3 id="h-layers">"Where it is active"<span class="quiet">" P(layer | latent) on the corpus"</span></h3>
            {body}
        </section>
    }
}

/// The words that rise at each layer.
#[component]
fn Lens(shown: Shown, chosen: Chosen, known: Known) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    let cells = known.described.iter().flat_map(|(_, lens, within)| {
        let cell = move |layer| lens.cell(*within, layer, n_layers).map(|cell| (layer, cell, lens.clone()));
        (0..n_layers).filter_map(cell).filter(|(_, cell, _)| !cell.raises.is_empty())
    });
    let rows = cells
        .map(|(layer, cell, lens)| {
            let here = move || chosen.layer.get() == layer;
            let word = |&(word, rise): &(u32, f32)| {
                let word = lens.words.get(word as usize).map(|w| words::alone(w)).unwrap_or_default();
                view! { <span class="word" title=format!("logit {rise:+.2}")>{word}</span> }
            };
            view! {
                <tr class:here=here>
                    <th scope="row">{shown.layer_name(layer)}</th>
                    <td class="number">{figures::value(f64::from(cell.activation))}</td>
                    <td class="number">{cell.raises.first().map(|p| format!("{:+.2}", p.1))}</td>
                    <td><span class="words">{cell.raises.iter().map(word).collect_view()}</span></td>
                </tr>
            }
        })
        .collect::<Vec<_>>();
    let body = if rows.is_empty() {
        let why = if known.described.is_some() {
            "Its direction does not lie in the residual stream."
        } else {
            NOT_DESCRIBED
        };
        view! { <p class="quiet">{why}</p> }.into_any()
    } else {
        view! {
            <div class="scroll short" tabindex="0" role="region" aria-label="Lens by layer">
                <table class="flow-list">
                    <thead><tr><th scope="col">"Layer"</th><th scope="col">"Mean"</th><th scope="col">"Logit"</th><th scope="col">"Raises most"</th></tr></thead>
                    <tbody>{rows}</tbody>
                </table>
            </div>
        }
        .into_any()
    };
    view! {
        <section class="card" aria-labelledby="h-lens">
            <h3 id="h-lens">"What it says"<span class="quiet">" logit lens, layer by layer"</span></h3>
            {body}
            <p class="axis-note">"Its mean contribution at a layer, added to the layer's mean vector, through the final norm and the unembedding. The direction is the same; the sizes differ."</p>
        </section>
    }
}

/// A latent with the way to lock it.
fn lockable(shown: &Shown, chosen: Chosen, latent: u32) -> impl IntoView + use<> {
    let fires_on = shown.fires_on(latent);
    view! {
        <button type="button" class="small plain" title="Lock this latent" on:click=move |_| chosen.lock(None, None, Some(latent))>
            <b>"#"{latent}</b>" "{fires_on}
        </button>
    }
}

/// Transitions to the next layer.
#[component]
fn GoesWith(shown: Shown, chosen: Chosen, known: Known, fixed: Option<usize>) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    // Beside what a removal changes, the same layer is shown; else the one that is chosen.
    let layer = move || fixed.unwrap_or_else(|| chosen.layer.get());
    let (names, list) = (shown.clone(), shown.clone());
    let title = move || format!(" from layer {} to the next", names.layer_name(layer()));
    let rows = move || {
        let Some((place, ..)) = known.described else {
            return view! { <p class="quiet">{NOT_DESCRIBED}</p> }.into_any();
        };
        let found = list.latents.transitions(place, layer(), n_layers);
        if found.is_empty() {
            return view! { <p class="quiet">"Too rarely active at this layer, or nothing goes with it three times."</p> }.into_any();
        }
        let row = |t: &Transition| {
            view! {
                <tr>
                    <td>{lockable(&list, chosen, t.to)}</td>
                    <td class="number">{format!("{:.2}", t.cosine)}</td>
                    <td class="number">{figures::percent(f64::from(t.share))}</td>
                    <td class="number">{figures::count(u64::from(t.count))}</td>
                </tr>
            }
        };
        view! {
            <table class="flow-list">
                <thead><tr><th scope="col">"Latent"</th><th scope="col">"Cosine"</th><th scope="col">"Share"</th><th scope="col">"Tokens"</th></tr></thead>
                <tbody>{found.iter().map(row).collect_view()}</tbody>
            </table>
        }
        .into_any()
    };
    view! {
        <section class="card" aria-labelledby="h-with">
            <h3 id="h-with">"Goes with"<span class="quiet">{title}</span></h3>
            {rows}
            <p class="axis-note">"Active on the same tokens of the corpus, weighted by activation: a correlation, not a cause."</p>
        </section>
    }
}

/// What changes in this text without the latent.
#[component]
fn Causes(shown: Shown, effect: Option<Effect>) -> impl IntoView {
    let body = match &effect {
        None => view! { <p class="quiet">"Only the strongest latents of each text were removed, and this is not one of them."</p> }.into_any(),
        Some(effect) if effect.changes.is_empty() => {
            view! { <p class="quiet">"Nothing changed behind it."</p> }.into_any()
        }
        Some(effect) => {
            let rows = effect.changes.iter().map(|change| {
                let delta = f64::from(change.after - change.before);
                let fires_on = shown.fires_on(change.latent);
                view! {
                    <tr>
                        <th scope="row">{shown.layer_name(usize::from(change.layer))}</th>
                        <td><b>"#"{change.latent}</b>" "{fires_on}</td>
                        <td class="number">{figures::value(f64::from(change.before))}" → "{figures::value(f64::from(change.after))}</td>
                        <td class="number" class:down=delta < 0.0>{signed(delta)}</td>
                    </tr>
                }
            });
            let rows = rows.collect_view();
            view! {
                <div class="scroll short" tabindex="0" role="region" aria-label="Changes by layer">
                    <table class="flow-list">
                        <thead><tr><th scope="col">"Layer"</th><th scope="col">"Latent"</th><th scope="col">"Sum"</th><th scope="col">"Change"</th></tr></thead>
                        <tbody>{rows}</tbody>
                    </table>
                </div>
            }
            .into_any()
        }
    };
    let title = effect.map(|effect| {
        let layer = shown.layer_name(usize::from(effect.layer));
        format!(
            " taken out at layer {layer} of this text ({} in all)",
            figures::value(f64::from(effect.removed))
        )
    });
    view! {
        <section class="card" aria-labelledby="h-causes">
            <h3 id="h-causes">"Changes without it"<span class="quiet">{title}</span></h3>
            {body}
            <p class="axis-note">"Its contribution is subtracted from the residual stream on every token and the model runs on: a cause. Activations summed over the text, the four that change most at each later layer."</p>
        </section>
    }
}

fn signed(value: f64) -> String {
    let sign = if value < 0.0 { "−" } else { "+" };
    format!("{sign}{}", figures::value(value.abs()))
}

/// Nearest latents by decoder cosine.
#[component]
fn Near(shown: Shown, known: Known) -> impl IntoView {
    let ctx = ctx();
    let (shard, place) = known.feature;
    let neighbours = shard.features.get(place).map(|f| f.neighbours.clone()).unwrap_or_default();
    let rows = neighbours.into_iter().map(|(latent, cosine)| {
        let route = Route::feature(&shown.pack.entry.name, latent);
        let fires_on = shown.index.top_tokens.get(latent as usize).cloned().unwrap_or_default();
        let label = format!("Latent {latent}, fires on {}", shown.fires_on(latent));
        view! {
            <li>
                <a href=move || ctx.href(route.clone()) aria-label=label>{format!("#{latent}")}</a>
                <span class="number">{format!("{cosine:.2}")}</span>
                <Words words=fires_on />
            </li>
        }
    });
    view! {
        <section class="card" aria-labelledby="h-flow-near">
            <h3 id="h-flow-near">"Nearest latents"<span class="quiet">" by cosine of directions"</span></h3>
            <ol class="near">{rows.collect_view()}</ol>
        </section>
    }
}
