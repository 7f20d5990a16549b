//! All packs of the site: what each describes, how good it is, and where it came from.

use std::sync::Arc;

use leptos::prelude::*;
use shared::pack::{Catalogue, Manifest, Metrics, PackEntry};

use super::charts::Densities;
use super::context::{ctx, load};
use super::parts::{Figure, when};
use crate::data::{self, Pack};
use crate::state::address::Route;
use crate::state::figures;
use crate::state::load::Load;

/// The page.
#[component]
pub(super) fn Overview() -> impl IntoView {
    let catalogue = load(|| (), |()| data::catalogue());
    view! {
        <h1>"Sparse autoencoders, looked into"</h1>
        <p class="lead">
            "Each pack is one autoencoder trained on the activations of a language model: its features, where they fire, what they do, and the encoder itself, which runs here in the page."
        </p>
        {move || {
            when(
                catalogue.get(),
                |catalogue: Arc<Catalogue>| {
                    if catalogue.packs.is_empty() {
                        return view! { <p>"This site has no packs yet."</p> }.into_any();
                    }
                    let cards = catalogue.packs.iter().cloned().map(|entry| view! { <PackCard entry=entry /> });
                    view! { <div class="packs">{cards.collect_view()}</div> }.into_any()
                },
            )
        }}
    }
}

#[component]
fn PackCard(entry: PackEntry) -> impl IntoView {
    let ctx = ctx();
    let name = entry.name.clone();
    let pack: ReadSignal<Load<Arc<Pack>>> =
        load(move || name.clone(), |name| async move { data::pack(&name).await });
    let list = Route::list(&entry.name);
    let (texts, texts_name) = match entry.layers {
        Some(_) => (Route::flow(&entry.name), "Flow"),
        None => (Route::try_it(&entry.name), "Try it"),
    };
    let place = match entry.layers {
        Some(layers) => format!("{} of {layers} layers", entry.site.name()),
        None => format!("{}.{}", entry.site.name(), entry.layer),
    };
    let first = list.clone();
    view! {
        <article class="card pack">
            <h2><a href=move || ctx.href(first.clone())>{entry.title.clone()}</a></h2>
            <p class="chips">
                <span class="chip">{entry.model.clone()}</span>
                <span class="chip">{place}</span>
                <span class="chip">{figures::count(entry.n_latents as u64)}" latents"</span>
            </p>
            {move || when(pack.get(), |pack| view! { <Details manifest=pack.manifest.clone() /> }.into_any())}
            <p class="actions">
                <a class="button" href=move || ctx.href(list.clone())>"Features"</a>
                <a class="button primary" href=move || ctx.href(texts.clone())>{texts_name}</a>
            </p>
        </article>
    }
}

#[component]
fn Details(manifest: Manifest) -> impl IntoView {
    let Manifest { model, sae, corpus, metrics, density_histogram, provenance, flow, .. } = manifest;
    let reads = match &flow {
        Some(flow) => format!("{} of {} blocks, {} values", sae.site.name(), flow.layers.len(), sae.d_in),
        None => format!("{} of block {} (from 0), {} values", sae.site.name(), sae.layer, sae.d_in),
    };
    let provenance = serde_json::to_string_pretty(&provenance).unwrap_or_else(|e| e.to_string());
    view! {
        <Quality metrics=metrics />
        <h3>"Firing density of the latents"</h3>
        <Densities histogram=density_histogram />
        <p class="axis-note">"share of tokens, both axes logarithmic; shaded: more than one token in ten"</p>
        <dl class="facts">
            <div><dt>"Model"</dt><dd>{model.name}", "{model.architecture}", "{model.n_layers}" blocks, width "{model.d_model}</dd></div>
            <div><dt>"Reads"</dt><dd>{reads}</dd></div>
            <div><dt>"Corpus"</dt><dd>{corpus.name}", "{figures::count(corpus.n_tokens)}" tokens in sequences of "{corpus.sequence_length}</dd></div>
        </dl>
        <details><summary>"Provenance"</summary><pre tabindex="0">{provenance}</pre></details>
    }
}

#[component]
fn Quality(metrics: Option<Metrics>) -> impl IntoView {
    let Some(m) = metrics else {
        return view! { <p class="quiet">"The quality of this autoencoder was not measured."</p> }.into_any();
    };
    let print = |v: Option<f64>, show: fn(f64) -> String| v.map_or_else(|| "–".to_owned(), show);
    view! {
        <dl class="figures">
            <Figure name="L0" value=print(m.l0, figures::value) explain="Mean number of active latents a token" />
            <Figure name="FVU" value=print(m.fvu, figures::value) explain="Fraction of variance unexplained; lower is better" />
            <Figure name="Delta loss" value=print(m.delta_loss, figures::value) explain="Nats a token added when the model runs on the reconstruction" />
            <Figure name="Loss recovered" value=print(m.loss_recovered, figures::percent) explain="Share of the loss that zeroing the activation costs and the reconstruction gives back" />
            <Figure name="Dead" value=print(m.dead_share, figures::percent) explain="Share of latents that never fired" />
        </dl>
    }
    .into_any()
}
