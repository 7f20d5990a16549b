//! One latent: what it raises and lowers, how often it is how active, where, and what is near it.

use std::sync::Arc;

use leptos::prelude::*;
use shared::pack::{Feature, FeatureShard, Index};

use super::charts::{ActivationHistogram, Densities, Logits};
use super::context::{Ctx, ctx, load};
use super::examples::Examples;
use super::parts::{Words, when};
use crate::data::{self, Pack};
use crate::state::address::{FlowView, Route};
use crate::state::list::DENSE;
use crate::state::{figures, words};

/// All that is known of one latent.
#[derive(Clone)]
struct Known {
    pack: Arc<Pack>,
    index: Arc<Index>,
    shard: Arc<FeatureShard>,
    place: usize,
    latent: u32,
}

impl Known {
    fn feature(&self) -> &Feature {
        &self.shard.features[self.place]
    }

    fn word(&self, word: u32) -> String {
        self.shard.words.get(word as usize).cloned().unwrap_or_default()
    }

    /// Everything as JSON, for people who go on in another program.
    fn json(&self) -> String {
        let i = self.latent as usize;
        let feature = self.feature();
        let logits = |list: &[(u32, f32)]| -> Vec<serde_json::Value> {
            list.iter()
                .map(|&(word, value)| serde_json::json!({"token": self.word(word), "logit": value}))
                .collect()
        };
        let examples: Vec<serde_json::Value> = feature
            .examples
            .iter()
            .map(|e| {
                let tokens: Vec<String> = e.words.iter().map(|&w| self.word(w)).collect();
                serde_json::json!({"group": e.group.code(), "sequence": e.sequence, "start": e.start, "peak": e.peak,
                    "tokens": tokens, "activations": e.values})
            })
            .collect();
        let value = serde_json::json!({
            "pack": self.pack.entry.name, "latent": self.latent,
            "model": self.pack.manifest.model, "sae": self.pack.manifest.sae,
            "density": self.index.density[i], "max_activation": self.index.max_activation[i],
            "mean_activation": self.index.mean_activation[i], "histogram": feature.histogram,
            "top_logits": logits(&feature.top_logits), "bottom_logits": logits(&feature.bottom_logits),
            "neighbours": feature.neighbours, "examples": examples,
        });
        serde_json::to_string_pretty(&value).unwrap_or_else(|e| e.to_string())
    }
}

/// The page.
#[component]
pub(super) fn FeaturePage(pack: String) -> impl IntoView {
    let ctx = ctx();
    let latent = Memo::new(move |_| {
        ctx.address.with(|a| if let Route::Feature { latent, .. } = a.route { latent } else { 0 })
    });
    let name = pack.clone();
    let known = load(
        move || (name.clone(), latent.get()),
        |(name, latent)| async move {
            let pack = data::pack(&name).await?;
            let (shard, place) = data::shard(&pack, latent).await?;
            let index = data::index(&pack).await?;
            Ok(Known { pack, index, shard, place, latent })
        },
    );
    view! {
        <Bar pack=pack latent=latent />
        {move || when(known.get(), |known| view! { <Card known=known /> }.into_any())}
    }
}

/// The title with the ways to other latents.
#[component]
fn Bar(pack: String, latent: Memo<u32>) -> impl IntoView {
    let ctx = ctx();
    let go = {
        let pack = pack.clone();
        move |step: isize| ctx.step_latent(pack.clone(), latent.get_untracked(), step)
    };
    let (back, on) = (go.clone(), go);
    let (random, list) = (pack.clone(), pack.clone());
    view! {
        <div class="feature-bar">
            <h1><span class="quiet">{pack}" "</span>{move || format!("#{}", latent.get())}</h1>
            <div class="actions">
                <button type="button" on:click=move |_| back(-1) title="Previous (k)">"← Previous"</button>
                <button type="button" on:click=move |_| on(1) title="Next (j)">"Next →"</button>
                <button type="button" on:click=move |_| ctx.random_latent(random.clone()) title="Random (r)">"Random"</button>
                <a class="button" href=move || {
                    let (last, view) = ctx.last_list.get();
                    let view = if last == list { view } else { Default::default() };
                    ctx.href(Route::List { pack: list.clone(), view })
                }>"List"</a>
            </div>
        </div>
    }
}

#[component]
fn Card(known: Known) -> impl IntoView {
    let ctx = ctx();
    let i = known.latent as usize;
    let feature = known.feature().clone();
    let manifest = &known.pack.manifest;
    let (density, max, mean) =
        (known.index.density[i], known.index.max_activation[i], known.index.mean_activation[i]);
    let named = |list: &[(u32, f32)]| list.iter().map(|&(w, v)| (known.word(w), v)).collect::<Vec<_>>();
    let (top, bottom) = (named(&feature.top_logits), named(&feature.bottom_logits));
    let scale = top.iter().chain(&bottom).map(|p| p.1.abs()).fold(0.0, f32::max);
    let badge = if density == 0.0 {
        Some(("Dead", "It never fired on the corpus"))
    } else if density > DENSE {
        Some(("Dense", "It fires on more than one token in ten"))
    } else {
        None
    };
    let site = match &manifest.flow {
        Some(flow) => format!("{} of {} layers", manifest.sae.site.name(), flow.layers.len()),
        None => format!("{}.{}", manifest.sae.site.name(), manifest.sae.layer),
    };
    let across = manifest.flow.is_some().then(|| {
        let view = FlowView { latent: Some(known.latent), ..FlowView::default() };
        let route = Route::Flow { pack: known.pack.entry.name.clone(), view };
        view! { <a class="button" href=move || ctx.href(route.clone())>"Across the layers"</a> }
    });
    let n_tokens = figures::count(manifest.corpus.n_tokens);
    let histogram = manifest.density_histogram.clone();
    let json = known.clone();
    view! {
        <div class="chips">
            <span class="chip">{manifest.model.name.clone()}</span>
            <span class="chip">{site}</span>
            <span class="chip">"width "{figures::count(manifest.sae.n_latents as u64)}</span>
            <span class="chip" title=format!("share of {n_tokens} tokens")>"density "{figures::percent(f64::from(density))}</span>
            <span class="chip">"max "{figures::value(f64::from(max))}</span>
            <span class="chip">"mean when active "{figures::value(f64::from(mean))}</span>
            {badge.map(|(name, why)| view! { <span class="chip badge" title=why>{name}</span> })}
            <span class="chip-words">"fires on "<Words words=known.index.top_tokens[i].clone() /></span>
        </div>
        <div class="feature-grid">
            <section class="card" aria-labelledby="h-logits">
                <h2 id="h-logits">"Effect on the next token"</h2>
                <div class="logit-pair">
                    <Logits title="Raises" rows=top scale=scale negative=false />
                    <Logits title="Lowers" rows=bottom scale=scale negative=true />
                </div>
                <p class="axis-note">"logits of a unit activation, straight through the final norm and the unembedding"</p>
            </section>
            <section class="card" aria-labelledby="h-hist">
                <h2 id="h-hist">"Activations"</h2>
                <ActivationHistogram counts=feature.histogram.clone() max=max />
                <p class="axis-note">"tokens (logarithmic) by activation"</p>
                <h3>"Density among all latents"</h3>
                <Densities histogram=histogram mark=density />
                <p class="axis-note">"latents (logarithmic) by density; the line is this one"</p>
            </section>
            <Near known=known.clone() />
            <Examples shard=known.shard.clone() place=known.place max=max n_tokens=manifest.corpus.n_tokens />
        </div>
        <p class="actions end">
            {across}
            <button type="button" on:click=move |_| copy_link(ctx)>"Copy link"</button>
            <button type="button" on:click=move |_| ctx.copy("JSON", json.json())>"Copy JSON"</button>
        </p>
    }
}

/// Puts the address of what is shown on the clipboard.
pub(super) fn copy_link(ctx: Ctx) {
    ctx.copy("Link", window().location().href().unwrap_or_default());
}

#[component]
fn Near(known: Known) -> impl IntoView {
    let ctx = ctx();
    let pack = known.pack.entry.name.clone();
    let rows = known.feature().neighbours.clone().into_iter().map(|(latent, cosine)| {
        let fires_on = known.index.top_tokens.get(latent as usize).cloned().unwrap_or_default();
        let label: String = fires_on.first().map(|w| words::alone(w)).unwrap_or_default();
        let route = Route::feature(&pack, latent);
        view! {
            <li>
                <a href=move || ctx.href(route.clone()) aria-label=format!("Latent {latent}, fires on {label}")>{format!("#{latent}")}</a>
                <span class="number">{format!("{cosine:.2}")}</span>
                <Words words=fires_on />
            </li>
        }
    });
    view! {
        <section class="card" aria-labelledby="h-near">
            <h2 id="h-near">"Nearest latents"</h2>
            <ol class="near">{rows.collect_view()}</ol>
            <p class="axis-note">"cosine of decoder directions"</p>
        </section>
    }
}
