//! What the maps show, as tables: for who does not see colours, and for copying.

use leptos::prelude::*;

use super::flow::{Chosen, Shown};
use crate::state::figures;

/// Latents in a row.
const MOST: usize = 12;

/// A row: what it is about, and two cells.
type Line = (String, String, String);

#[component]
pub(super) fn FlowTable(shown: Shown, chosen: Chosen) -> impl IntoView {
    let (kind, set_kind) = signal("token".to_owned());
    let (open, set_open) = signal(false);
    let table = move || {
        let (token, layer, latent) = (chosen.token.get(), chosen.layer.get(), chosen.latent.get());
        let (caption, head, lines) = match (&kind.get()[..], latent) {
            ("layer", _) => by_token(&shown, layer),
            ("latent", Some(latent)) => of_latent(&shown, latent),
            _ => by_layer(&shown, token),
        };
        let rows = lines
            .into_iter()
            .map(|(name, a, b)| view! { <tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr> });
        view! {
            <div class="scroll" tabindex="0" role="region" aria-label="Table">
                <table class="codes" id="flow-codes">
                    <caption>{caption}</caption>
                    <thead><tr>{head.map(|name| view! { <th scope="col">{name}</th> })}</tr></thead>
                    <tbody>{rows.collect_view()}</tbody>
                </table>
            </div>
        }
    };
    view! {
        <section class="card" aria-label="As a table">
            <div class="controls">
                <button type="button" id="show-table" aria-expanded=move || open.get().to_string() on:click=move |_| set_open.update(|o| *o = !*o)>"As a table"</button>
                <Show when=move || open.get()>
                    <label for="table-of">"of"</label>
                    <select id="table-of" on:change=move |event| set_kind.set(event_target_value(&event))>
                        <option value="token">"the token, layer by layer"</option>
                        <option value="layer">"the layer, token by token"</option>
                        <option value="latent">"the latent, token by token"</option>
                    </select>
                </Show>
            </div>
            {move || open.get().then(&table)}
        </section>
    }
}

/// The strongest latents of a place.
fn names(shown: &Shown, layer: usize, token: usize) -> String {
    let strongest = shown.flow.strongest(layer, token);
    let names = strongest
        .iter()
        .take(MOST)
        .map(|(latent, value)| format!("#{latent} {}", figures::value(f64::from(*value))));
    let rest = strongest.len().saturating_sub(MOST);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    names.collect::<Vec<_>>().join(", ") + &more
}

fn missed(shown: &Shown, layer: usize, token: usize) -> String {
    if shown.flow.skipped(layer, token) {
        return "not encoded".to_owned();
    }
    figures::percent(f64::from(shown.flow.errors(token).get(layer).copied().unwrap_or(0.0)))
}

fn by_layer(shown: &Shown, token: usize) -> (String, [&'static str; 3], Vec<Line>) {
    let line = |layer| (shown.layer_name(layer), missed(shown, layer, token), names(shown, layer, token));
    let caption = format!("Token {token} {} at every layer", shown.word(token));
    (caption, ["Layer", "Missed", "Latents, strongest first"], (0..shown.flow.n_layers()).map(line).collect())
}

fn by_token(shown: &Shown, layer: usize) -> (String, [&'static str; 3], Vec<Line>) {
    let line = |token| {
        let name = format!("{token} {}", shown.word(token));
        (name, missed(shown, layer, token), names(shown, layer, token))
    };
    let caption = format!("Layer {} on every token", shown.layer_name(layer));
    (caption, ["Token", "Missed", "Latents, strongest first"], (0..shown.flow.n_tokens()).map(line).collect())
}

fn of_latent(shown: &Shown, latent: u32) -> (String, [&'static str; 3], Vec<Line>) {
    let line = |token: usize| {
        let layers = (0..shown.flow.n_layers()).map(|layer| (layer, shown.flow.value(latent, layer, token)));
        let active: Vec<(usize, f32)> = layers.filter(|(_, value)| *value > 0.0).collect();
        let show = |&(layer, value): &(usize, f32)| {
            format!("{}: {}", shown.layer_name(layer), figures::value(f64::from(value)))
        };
        let list = active.iter().map(show).collect::<Vec<_>>().join(", ");
        (format!("{token} {}", shown.word(token)), active.len().to_string(), list)
    };
    let caption = format!("Latent #{latent} on every token");
    (caption, ["Token", "Layers", "Activation at each layer"], (0..shown.flow.n_tokens()).map(line).collect())
}
