//! Places in the corpus where a latent fires, grouped, with the peak tokens in one column.

use std::sync::Arc;

use leptos::prelude::*;
use shared::pack::{Example, FeatureShard, Group};

use super::tokens::{Legend, token};
use crate::state::figures;

/// A group of examples with its heading.
struct Section {
    title: String,
    note: String,
    examples: Vec<Example>,
}

/// All examples of the latent at `place` of `shard`.
#[component]
pub(super) fn Examples(shard: Arc<FeatureShard>, place: usize, max: f32, n_tokens: u64) -> impl IntoView {
    let sections = sections(&shard, place, max);
    let empty = sections.is_empty();
    let sections = sections
        .into_iter()
        .map(move |Section { title, note, examples }| {
            let shard = shard.clone();
            view! {
                <h3>{title}<span class="quiet">{note}</span></h3>
                <ul class="examples">
                    {examples.into_iter().map(|e| view! { <Row shard=shard.clone() example=e max=max /> }).collect_view()}
                </ul>
            }
        })
        .collect_view();
    view! {
        <section class="card wide" aria-labelledby="h-examples">
            <h2 id="h-examples">"Where it fires"</h2>
            {if empty {
                view! { <p class="quiet">"It never fired on the "{figures::count(n_tokens)}" tokens of the corpus."</p> }.into_any()
            } else {
                view! { <Legend scale="the largest activation on the corpus".to_owned() largest=max /> }.into_any()
            }}
            {sections}
        </section>
    }
}

fn sections(shard: &FeatureShard, place: usize, max: f32) -> Vec<Section> {
    let Some(feature) = shard.features.get(place) else { return Vec::new() };
    let of = |group: Group| -> Vec<Example> {
        feature.examples.iter().filter(|e| e.group == group).cloned().collect()
    };
    let total: u64 = feature.histogram.iter().copied().map(u64::from).sum();
    let mut sections = vec![Section {
        title: "Top".to_owned(),
        note: " largest activations".to_owned(),
        examples: of(Group::Top),
    }];
    for quarter in (1..=4u8).rev() {
        let bins = feature.histogram.len() / 4;
        let first = bins * usize::from(quarter - 1);
        let inside: u64 = feature.histogram.iter().skip(first).take(bins).copied().map(u64::from).sum();
        #[expect(clippy::cast_precision_loss, reason = "a percentage")]
        let share = inside as f64 / total.max(1) as f64;
        let bound = |q: u8| figures::value(f64::from(max) * f64::from(q) / 4.0);
        sections.push(Section {
            title: format!("{} to {}", bound(quarter - 1), bound(quarter)),
            note: format!(" {} of its activations", figures::percent(share)),
            examples: of(Group::Quantile(quarter)),
        });
    }
    let note = " drawn from all places where it fires: the honest view".to_owned();
    sections.push(Section { title: "Random".to_owned(), note, examples: of(Group::Random) });
    sections.retain(|s| !s.examples.is_empty());
    sections
}

#[component]
fn Row(shard: Arc<FeatureShard>, example: Example, max: f32) -> impl IntoView {
    let (open, set_open) = signal(false);
    let peak = usize::from(example.peak);
    let value = example.values.get(peak).copied().unwrap_or(0.0);
    let word = |i: usize| -> &str {
        example.words.get(i).and_then(|&w| shard.words.get(w as usize)).map_or("", String::as_str)
    };
    let tokens = |range: std::ops::Range<usize>| {
        range
            .map(|i| token(word(i), example.values.get(i).copied().unwrap_or(0.0), max, i == peak))
            .collect_view()
    };
    let place = format!(
        "sequence {}, token {}",
        example.sequence,
        u64::from(example.start) + u64::from(example.peak)
    );
    let label = format!("Whole context, {place}");
    view! {
        <li class="example" class:open=move || open.get()>
            <span class="number" title=place>{figures::value(f64::from(value))}</span>
            <span class="left">{tokens(0..peak)}</span>
            <span class="right">{tokens(peak..example.words.len())}</span>
            <button type="button" class="icon" aria-label=label aria-expanded=move || open.get().to_string()
                on:click=move |_| set_open.update(|o| *o = !*o)>
                <span aria-hidden="true">{move || if open.get() { "−" } else { "+" }}</span>
            </button>
        </li>
    }
}
