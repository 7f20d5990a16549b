//! The list of latents. Only the rows in sight are in the document, so a million would scroll as well.

use std::sync::Arc;

use leptos::html;
use leptos::prelude::*;
use shared::pack::Index;

use super::context::{ctx, load};
use super::parts::{Words, when};
use crate::data::{self, Pack};
use crate::state::address::Route;
use crate::state::figures;
use crate::state::list::{Filter, ListView, Sort};

/// Rows drawn above and below those in sight.
const SPARE: usize = 8;

/// The page.
#[component]
pub(super) fn List(pack: String) -> impl IntoView {
    let ctx = ctx();
    let name = pack.clone();
    let data = load(
        move || name.clone(),
        |name| async move {
            let pack = data::pack(&name).await?;
            let index = data::index(&pack).await?;
            Ok((pack, index))
        },
    );
    let view = Memo::new(move |_| {
        ctx.address.with(|a| match &a.route {
            Route::List { view, .. } => view.clone(),
            _ => ListView::default(),
        })
    });
    let name = pack.clone();
    Effect::new(move |_| ctx.last_list.set((name.clone(), view.get())));
    let change = Callback::new(move |view: ListView| ctx.replace(Route::List { pack: pack.clone(), view }));
    view! {
        {move || {
            when(
                data.get(),
                |(pack, index): (Arc<Pack>, Arc<Index>)| {
                    view! {
                        <h1>"Features of "{pack.manifest.title.clone()}</h1>
                        <Controls view=view change=change />
                        <Table pack=pack index=index view=view change=change />
                    }
                    .into_any()
                },
            )
        }}
    }
}

#[component]
fn Controls(view: Memo<ListView>, change: Callback<ListView>) -> impl IntoView {
    let search = move |event| {
        change.run(ListView { search: event_target_value(&event), ..view.get_untracked() });
    };
    let filter = move |event| {
        let key = event_target_value(&event);
        let filter = Filter::ALL.into_iter().find(|f| f.key() == key).unwrap_or_default();
        change.run(ListView { filter, ..view.get_untracked() });
    };
    let name = |f: Filter| match f {
        Filter::All => "all",
        Filter::Alive => "that fired",
        Filter::Dead => "dead (never fired)",
        Filter::Dense => "dense (over 10 %)",
    };
    view! {
        <form class="controls" role="search" on:submit=|e| e.prevent_default()>
            <label for="search">"Search"</label>
            <input id="search" type="search" placeholder="a token, or a number" autocomplete="off" spellcheck="false"
                prop:value=move || view.get().search on:input=search />
            <span class="pair">
            <label for="show">"Show"</label>
            <select id="show" on:change=filter prop:value=move || view.get().filter.key()>
                {Filter::ALL
                    .map(|f| view! { <option value=f.key() selected=move || view.get().filter == f>{name(f)}</option> })
                    .collect_view()}
            </select>
            </span>
            <span class="pair only-narrow">
            <label for="sort">"Sort"</label>
            <select id="sort" on:change=move |event| {
                let key = event_target_value(&event);
                let sort = Sort::ALL.into_iter().find(|s| s.key() == key).unwrap_or_default();
                change.run(ListView { sort, reversed: false, ..view.get_untracked() });
            }>
                {Sort::ALL
                    .map(|s| view! { <option value=s.key() selected=move || view.get().sort == s>{s.key()}</option> })
                    .collect_view()}
            </select>
            </span>
        </form>
    }
}

#[component]
fn Table(
    pack: Arc<Pack>,
    index: Arc<Index>,
    view: Memo<ListView>,
    change: Callback<ListView>,
) -> impl IntoView {
    let ctx = ctx();
    let name = pack.entry.name.clone();
    let total = index.density.len();
    let found = index.clone();
    let shown = Memo::new(move |_| Arc::new(view.get().select(&found)));
    let box_ref: NodeRef<html::Div> = NodeRef::new();
    let (top, set_top) = signal(0i32);
    // A new order starts at its beginning.
    Effect::new(move |before: Option<()>| {
        shown.track();
        if let (Some(()), Some(element)) = (before, box_ref.get_untracked()) {
            element.set_scroll_top(0);
            set_top.set(0);
        }
    });
    let row_height = move || if ctx.narrow.get() { 76 } else { 36 };
    let window_rows = move || {
        let height = box_ref.get().map_or(900, |b| b.client_height().max(300));
        let (row, shown) = (row_height(), shown.get());
        let first = usize::try_from(top.get() / row).unwrap_or(0).saturating_sub(SPARE);
        let count = usize::try_from(height / row).unwrap_or(0) + 2 * SPARE;
        let last = shown.len().min(first + count);
        (first..last).map(|place| (place, shown[place])).collect::<Vec<_>>()
    };
    let head = move |label: &'static str, sort: Sort| {
        let direction = move || {
            let view = view.get();
            let down = (sort == Sort::Index) == view.reversed;
            if view.sort == sort { if down { "descending" } else { "ascending" } } else { "none" }
        };
        view! {
            <div role="columnheader" aria-sort=direction class=format!("c-{}", sort.key())>
                <button type="button" on:click=move |_| change.run(view.get_untracked().sorted_by(sort))>
                    {label}<span class="arrow" aria-hidden="true"></span>
                </button>
            </div>
        }
    };
    view! {
        <p class="count" role="status">
            {move || figures::count(shown.get().len() as u64)}" of "{figures::count(total as u64)}" latents"
        </p>
        <div class="table" role="table" hidden=move || shown.get().is_empty() aria-label="Latents" aria-rowcount=move || shown.get().len() + 1>
            <div role="rowgroup">
                <div class="row head" role="row" aria-rowindex="1">
                    {head("Latent", Sort::Index)} {head("Density", Sort::Density)} {head("Max", Sort::Max)} {head("Mean", Sort::Mean)}
                    <div role="columnheader" class="c-tokens">"Fires on"</div>
                    <div role="columnheader" class="c-logits">"Raises"</div>
                </div>
            </div>
            <div class="rows" role="rowgroup" tabindex="0" aria-label="Rows" node_ref=box_ref
                on:scroll=move |_| if let Some(b) = box_ref.get_untracked() { set_top.set(b.scroll_top()) }>
                <div class="extent" role="presentation" style=move || format!("height: {}px", shown.get().len() * row_height() as usize)>
                    <For each=window_rows key=|row| *row let((place, latent))>
                        <Row name=name.clone() index=index.clone() place=place latent=latent top=Signal::derive(move || place as i32 * row_height()) />
                    </For>
                </div>
            </div>
        </div>
        <Show when=move || shown.get().is_empty()>
            <p class="quiet">"No latent matches. Clear the search, or show all."</p>
        </Show>
    }
}

#[component]
fn Row(name: String, index: Arc<Index>, place: usize, latent: u32, top: Signal<i32>) -> impl IntoView {
    let ctx = ctx();
    let i = latent as usize;
    let (density, max, mean) = (index.density[i], index.max_activation[i], index.mean_activation[i]);
    // Six decades of density on a short bar.
    let bar = if density > 0.0 { (100.0 * (1.0 + density.log10() / 6.0)).clamp(2.0, 100.0) } else { 0.0 };
    let route = Route::feature(&name, latent);
    view! {
        <div class="row" class:dead=density == 0.0 role="row" aria-rowindex=place + 2 style=move || format!("top: {}px", top.get())>
            <div role="cell" class="c-index"><a href=move || ctx.href(route.clone())>{format!("#{latent}")}</a></div>
            <div role="cell" class="c-density number" style=format!("--bar: {bar:.0}%")>
                {if density > 0.0 { figures::percent(f64::from(density)) } else { "dead".to_owned() }}
            </div>
            <div role="cell" class="c-max number">{figures::value(f64::from(max))}</div>
            <div role="cell" class="c-mean number">{figures::value(f64::from(mean))}</div>
            <div role="cell" class="c-tokens"><Words words=index.top_tokens[i].clone() /></div>
            <div role="cell" class="c-logits"><Words words=index.top_logits[i].clone() /></div>
        </div>
    }
}
