//! Beside the text: the latents of one token, or of all; below it, all codes as a table.

use std::sync::Arc;

use leptos::prelude::*;
use shared::pack::Index;

use super::context::ctx;
use super::parts::Words;
use crate::backend::Outcome;
use crate::data::Pack;
use crate::state::address::{Route, TryView};
use crate::state::list::DENSE;
use crate::state::{figures, shade, words};

/// Latents listed before the reader asks for all.
const FIRST: usize = 24;

/// The latents of the token in question, strongest first; of the whole text when there is none.
#[component]
pub(super) fn Panel(
    pack: Arc<Pack>,
    index: Arc<Index>,
    words: Vec<String>,
    outcome: Arc<Outcome>,
    token: Memo<Option<usize>>,
    locked: Memo<Option<usize>>,
    hover: RwSignal<Option<u32>>,
    view: Memo<TryView>,
    change: Callback<TryView>,
) -> impl IntoView {
    let (all, set_all) = signal(false);
    let densities = index.clone();
    let found = outcome.clone();
    let latents = Memo::new(move |_| {
        let mut latents =
            token.get().map_or_else(|| found.encoded.overall(), |t| found.encoded.token(t).to_vec());
        if view.get().hide_dense {
            latents.retain(|l| densities.density.get(l.0 as usize).is_none_or(|&d| d <= DENSE));
        }
        latents
    });
    let skipped = move || token.get().is_some_and(|t| outcome.encoded.skipped(t));
    let title = move || match token.get() {
        Some(t) => format!("Token {t} {}", words.get(t).map(|w| words::alone(w)).unwrap_or_default()),
        None => "The whole text".to_owned(),
    };
    let how = move || match (token.get(), locked.get()) {
        (_, Some(_)) => " locked; Esc unlocks",
        (Some(_), None) => " click or Enter locks",
        (None, None) => " strongest first; point at a token",
    };
    let rows = move || {
        let latents = latents.get();
        let strongest = latents.first().map_or(0.0, |l| l.1);
        let count = if all.get() { latents.len() } else { FIRST };
        latents
            .into_iter()
            .take(count)
            .map(|(latent, value)| {
                view! {
                    <Latent pack=pack.clone() index=index.clone() latent=latent value=value strongest=strongest
                        hover=hover view=view change=change />
                }
            })
            .collect_view()
    };
    let more = move || latents.with(Vec::len).saturating_sub(FIRST);
    view! {
        <section class="card panel" aria-labelledby="h-panel">
            <h2 id="h-panel">{title}<span class="quiet">{how}</span></h2>
            <label class="check">
                <input type="checkbox" prop:checked=move || view.get().hide_dense
                    on:change=move |e| change.run(TryView { hide_dense: event_target_checked(&e), ..view.get_untracked() }) />
                "hide dense latents (over 10 % of tokens)"
            </label>
            <p class="count">
                {move || if skipped() { "Not encoded: a special token, or the first of the text.".to_owned() }
                else { format!("{} latents", latents.with(Vec::len)) }}
            </p>
            <ol class="latents" on:mouseleave=move |_| hover.set(None)>{rows}</ol>
            <Show when=move || { more() > 0 }>
                <button type="button" on:click=move |_| set_all.update(|a| *a = !*a)>
                    {move || if all.get() { "Show fewer".to_owned() } else { format!("Show {} more", more()) }}
                </button>
            </Show>
        </section>
    }
}

#[component]
fn Latent(
    pack: Arc<Pack>,
    index: Arc<Index>,
    latent: u32,
    value: f32,
    strongest: f32,
    hover: RwSignal<Option<u32>>,
    view: Memo<TryView>,
    change: Callback<TryView>,
) -> impl IntoView {
    let ctx = ctx();
    let i = latent as usize;
    let fires_on = index.top_tokens.get(i).cloned().unwrap_or_default();
    let seen = index.max_activation.get(i).copied().unwrap_or(0.0);
    let of_max = (seen > 0.0).then(|| format!("{:.0} % of its maximum on the corpus", 100.0 * value / seen));
    let route = Route::feature(&pack.entry.name, latent);
    let is_locked = move || view.get().latent == Some(latent);
    let lock = move |_| {
        let next = if is_locked() { None } else { Some(latent) };
        change.run(TryView { latent: next, ..view.get_untracked() });
    };
    view! {
        <li class:locked=is_locked on:mouseenter=move |_| hover.set(Some(latent))>
            <button type="button" class="shade" aria-pressed=move || is_locked().to_string() on:click=lock
                on:focus=move |_| hover.set(Some(latent)) on:blur=move |_| hover.set(None)
                title=of_max aria-label=format!("Shade the text with latent {latent}, activation {}", figures::value(f64::from(value)))>
                <span class="meter" aria-hidden="true"><span style=format!("width: {:.1}%", shade::bar(value, strongest))></span></span>
                <span class="number">{figures::value(f64::from(value))}</span>
            </button>
            <a href=move || ctx.href(route.clone())>{format!("#{latent}")}</a>
            <Words words=fires_on />
        </li>
    }
}

/// All codes in words, for screen readers and for copying; made when opened.
#[component]
pub(super) fn CodesTable(words: Vec<String>, outcome: Arc<Outcome>) -> impl IntoView {
    let (open, set_open) = signal(false);
    let table = move || {
        let encoded = &outcome.encoded;
        let rows = words.iter().enumerate().map(|(t, word)| {
            let codes: Vec<String> = encoded
                .token(t)
                .iter()
                .map(|(latent, value)| format!("#{latent}: {}", figures::value(f64::from(*value))))
                .collect();
            let codes = if encoded.skipped(t) { "not encoded".to_owned() } else { codes.join(", ") };
            view! {
                <tr>
                    <th scope="row">{t}</th>
                    <td><span class="word">{words::alone(word)}</span></td>
                    <td class="number">{encoded.token(t).len()}</td>
                    <td>{codes}</td>
                </tr>
            }
        });
        view! {
            <div class="scroll" tabindex="0" role="region" aria-label="Codes">
                <table class="codes" id="codes">
                    <thead><tr><th scope="col">"Token"</th><th scope="col">"Text"</th><th scope="col">"Active"</th><th scope="col">"Latents, strongest first"</th></tr></thead>
                    <tbody>{rows.collect_view()}</tbody>
                </table>
            </div>
        }
    };
    view! {
        <section class="card">
            <button type="button" id="show-codes" aria-expanded=move || open.get().to_string() on:click=move |_| set_open.update(|o| *o = !*o)>
                "All codes as a table"
            </button>
            {move || open.get().then(&table)}
        </section>
    }
}
