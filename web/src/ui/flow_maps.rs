//! The three maps: layers by tokens of a latent, latents by layers of a token, latents by tokens of a layer.

use leptos::html;
use leptos::prelude::*;
use web_sys::{KeyboardEvent, MouseEvent};

use super::flow::{Chosen, Shown};
use crate::state::figures;
use crate::state::flow::{Row, step};
use crate::state::flow_shapes::{self, LEVELS};

/// Latents in a map.
const ROWS: usize = 14;

/// What a map shows: cells, what the rows are called, and the cell that is chosen.
#[derive(Clone, Copy)]
struct Cells {
    paths: Memo<[String; LEVELS]>,
    n_columns: usize,
    n_rows: Memo<usize>,
    /// Column and row of what is chosen, where it is in the map.
    here: Memo<(Option<usize>, Option<usize>)>,
}

/// Column and row.
type Cell = (usize, usize);

/// A map: pointing previews, clicking or Enter locks, arrows move and lock.
#[component]
fn Map(
    id: &'static str,
    label: Signal<String>,
    cells: Cells,
    /// Called with the cell the pointer is on.
    point: Callback<Cell>,
    /// Called with the cell that is locked.
    lock: Callback<Cell>,
    /// What is behind: called when the pointer leaves.
    leave: Callback<()>,
    /// Whether the first row is at the bottom.
    #[prop(optional)]
    upwards: bool,
) -> impl IntoView {
    let Cells { paths, n_columns, n_rows, here } = cells;
    let plot: NodeRef<html::Div> = NodeRef::new();
    let cell_of = move |event: &MouseEvent| -> Option<Cell> {
        let area = plot.get_untracked()?.get_bounding_client_rect();
        let (rows, share) = (n_rows.get_untracked(), |at: f64, size: f64| at / size.max(1.0));
        let x = share(f64::from(event.client_x()) - area.left(), area.width());
        let y = share(f64::from(event.client_y()) - area.top(), area.height());
        Some((place(x, n_columns)?, turned(place(y, rows)?, rows, upwards)))
    };
    let on_key = move |event: KeyboardEvent| {
        let key = event.key();
        let (column, row) = here.get_untracked();
        let (column, row, rows) = (column.unwrap_or(0), row.unwrap_or(0), n_rows.get_untracked());
        let vertical = if upwards { ("ArrowUp", "ArrowDown") } else { ("ArrowDown", "ArrowUp") };
        let next = step(&key, ("ArrowRight", "ArrowLeft"), column, n_columns).map(|column| (column, row));
        let next = next.or_else(|| step(&key, vertical, row, rows).map(|row| (column, row)));
        let next = next.or_else(|| matches!(key.as_str(), "Enter" | " ").then_some((column, row)));
        if let Some(next) = next {
            event.prevent_default();
            event.stop_propagation();
            leave.run(());
            lock.run(next);
        }
    };
    let layers = (0..LEVELS).map(|level| {
        let opacity = format!("{:.2}", flow_shapes::opacity(level));
        view! { <path fill-opacity=opacity d=move || paths.with(|paths| paths[level].clone())></path> }
    });
    let cross = move || {
        let (column, row) = here.get();
        let rows = n_rows.get();
        let column = column.map(|x| view! { <rect class="cross" x=x y="0" width="1" height=rows></rect> });
        let row = row.map(|y| view! { <rect class="cross" x="0" y=turned(y, rows, upwards) width=n_columns height="1"></rect> });
        (column, row)
    };
    let flip = move || if upwards { format!("matrix(1 0 0 -1 0 {})", n_rows.get()) } else { String::new() };
    view! {
        <div class="flow-plot" id=id node_ref=plot tabindex="0" role="application" aria-roledescription="heat map"
            aria-label=label aria-describedby="flow-here" on:keydown=on_key
            on:mousemove=move |event| if let Some(cell) = cell_of(&event) { point.run(cell) }
            on:mouseleave=move |_| leave.run(())
            on:click=move |event| if let Some(cell) = cell_of(&event) { leave.run(()); lock.run(cell) }>
            <svg aria-hidden="true" preserveAspectRatio="none" viewBox=move || format!("0 0 {n_columns} {}", n_rows.get().max(1))>
                <g class="cells" transform=flip>{layers.collect_view()}</g>
                {cross}
            </svg>
        </div>
    }
}

/// The place of `share` of a length among `n`; none outside.
fn place(share: f64, n: usize) -> Option<usize> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a place on the screen"
    )]
    let at = (share * n as f64) as usize;
    (share >= 0.0 && at < n).then_some(at)
}

/// Rows counted from the other end.
fn turned(row: usize, rows: usize, turn: bool) -> usize {
    if turn { rows.saturating_sub(row + 1) } else { row }
}

/// Which labels of an axis of `n` are shown, so that about `most` are.
fn ticks(n: usize, most: usize) -> Vec<usize> {
    let every =
        [1, 2, 5, 10, 20, 50, 100, 200, 500].into_iter().find(|every| n / every <= most).unwrap_or(1000);
    (0..n).step_by(every).collect()
}

/// The labels of layers, from the bottom.
fn layer_axis(shown: &Shown) -> impl IntoView + use<> {
    let n = shown.flow.n_layers();
    let labels = ticks(n, 8).into_iter().map(|layer| {
        #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
        let bottom = 100.0 * (layer as f64 + 0.5) / n as f64;
        view! { <span style=format!("bottom: {bottom:.2}%")>{shown.layer_name(layer)}</span> }
    });
    view! { <div class="flow-axis-y" aria-hidden="true">{labels.collect_view()}</div> }
}

/// Labels under the columns.
fn axis_x(n: usize, most: usize, name: impl Fn(usize) -> String) -> impl IntoView {
    let labels = ticks(n, most).into_iter().map(|at| {
        #[expect(clippy::cast_precision_loss, reason = "a few hundred columns")]
        let left = 100.0 * (at as f64 + 0.5) / n as f64;
        view! { <span style=format!("left: {left:.2}%")>{name(at)}</span> }
    });
    view! { <div class="flow-axis-x" aria-hidden="true">{labels.collect_view()}</div> }
}

/// The names of the latents of a map's rows.
fn latent_axis(shown: Shown, chosen: Chosen, rows: Memo<Vec<Row>>) -> impl IntoView {
    let names = move || {
        let names = rows.get().into_iter().map(|Row { latent, .. }| {
            let here = move || chosen.latent.get() == Some(latent);
            view! {
                <span class:here=here on:mouseenter=move |_| chosen.point(None, None, Some(latent))
                    on:click=move |_| chosen.lock(None, None, Some(latent))>
                    <b>"#"{latent}</b>" "{shown.fires_on(latent)}
                </span>
            }
        });
        names.collect_view()
    };
    view! { <div class="flow-names" aria-hidden="true" on:mouseleave=move |_| chosen.point(None, None, None)>{names}</div> }
}

fn largest(rows: &[Row]) -> f32 {
    rows.iter().flat_map(|row| &row.values).copied().fold(0.0, f32::max)
}

fn row_paths(rows: &[Row], n_columns: usize) -> [String; LEVELS] {
    let values: Vec<f32> = rows.iter().flat_map(|row| &row.values).copied().collect();
    flow_shapes::cells(&values, n_columns, largest(rows))
}

/// One latent: layers upwards, tokens to the right.
#[component]
pub(super) fn LatentMap(shown: Shown, chosen: Chosen) -> impl IntoView {
    let (n_layers, n_tokens) = (shown.flow.n_layers(), shown.flow.n_tokens());
    let flow = shown.flow.clone();
    let values =
        Memo::new(move |_| chosen.latent.get().map(|latent| flow.latent(latent)).unwrap_or_default());
    let most = move || values.with(|v| v.iter().copied().fold(0.0, f32::max));
    let cells = Cells {
        paths: Memo::new(move |_| {
            values.with(|v| flow_shapes::cells(v, n_tokens, v.iter().copied().fold(0.0, f32::max)))
        }),
        n_columns: n_tokens,
        n_rows: Memo::new(move |_| n_layers),
        here: Memo::new(move |_| (Some(chosen.token.get()), Some(chosen.layer.get()))),
    };
    let name = move || {
        chosen.latent.get().map_or_else(|| "No latent".to_owned(), |latent| format!("Latent #{latent}"))
    };
    let label = Signal::derive(move || format!("{}: layers by tokens; arrows move", name()));
    let words = shown.clone();
    view! {
        <section class="card" aria-labelledby="h-latent">
            <h2 id="h-latent">{name}<span class="quiet">" on every token, at every layer"</span></h2>
            <div class="flow-map scroll-x">
                {layer_axis(&shown)}
                <Map id="flow-latent" label=label cells=cells upwards=true
                    point=Callback::new(move |(token, layer)| chosen.point(Some(token), Some(layer), None))
                    lock=Callback::new(move |(token, layer)| chosen.lock(Some(token), Some(layer), None))
                    leave=Callback::new(move |()| chosen.point(None, None, None)) />
                {axis_x(n_tokens, 14, |token| token.to_string())}
            </div>
            <p class="axis-note">
                "layers upwards, tokens to the right; the strongest is "{move || figures::value(f64::from(most()))}", here "
                {move || words.word(chosen.token.get())}
            </p>
        </section>
    }
}

/// One token: latents by the layer they are centred on, layers to the right.
#[component]
pub(super) fn TokenMap(shown: Shown, chosen: Chosen) -> impl IntoView {
    let n_layers = shown.flow.n_layers();
    let flow = shown.flow.clone();
    let rows = Memo::new(move |_| flow.of_token(chosen.token.get(), ROWS));
    let cells = Cells {
        paths: Memo::new(move |_| rows.with(|rows| row_paths(rows, n_layers))),
        n_columns: n_layers,
        n_rows: Memo::new(move |_| rows.with(Vec::len)),
        here: Memo::new(move |_| (Some(chosen.layer.get()), place_of(rows, chosen.latent.get()))),
    };
    let words = shown.clone();
    let name = move || format!("Token {} {}", chosen.token.get(), words.word(chosen.token.get()));
    let label = Signal::derive({
        let name = name.clone();
        move || format!("{}: latents by layers; arrows move", name())
    });
    let at = move |row: usize| rows.with_untracked(|rows| rows.get(row).map(|row| row.latent));
    let layers = shown.clone();
    view! {
        <section class="card" aria-labelledby="h-token">
            <h2 id="h-token">{name}<span class="quiet">" through the layers"</span></h2>
            <div class="flow-map named">
                {latent_axis(shown, chosen, rows)}
                <Map id="flow-token" label=label cells=cells
                    point=Callback::new(move |(layer, row)| chosen.point(None, Some(layer), at(row)))
                    lock=Callback::new(move |(layer, row)| chosen.lock(None, Some(layer), at(row)))
                    leave=Callback::new(move |()| chosen.point(None, None, None)) />
                {axis_x(n_layers, 10, move |layer| layers.layer_name(layer))}
            </div>
            <p class="axis-note">
                "its strongest latents, at most "{ROWS}", by the layer they are centred on; the strongest is "
                {move || figures::value(f64::from(rows.with(|rows| largest(rows))))}
            </p>
        </section>
    }
}

/// One layer: its latents, tokens to the right.
#[component]
pub(super) fn LayerMap(shown: Shown, chosen: Chosen) -> impl IntoView {
    let n_tokens = shown.flow.n_tokens();
    let flow = shown.flow.clone();
    let rows = Memo::new(move |_| flow.of_layer(chosen.layer.get(), ROWS));
    let cells = Cells {
        paths: Memo::new(move |_| rows.with(|rows| row_paths(rows, n_tokens))),
        n_columns: n_tokens,
        n_rows: Memo::new(move |_| rows.with(Vec::len)),
        here: Memo::new(move |_| (Some(chosen.token.get()), place_of(rows, chosen.latent.get()))),
    };
    let names = shown.clone();
    let name = move || format!("Layer {}", names.layer_name(chosen.layer.get()));
    let label = Signal::derive({
        let name = name.clone();
        move || format!("{}: latents by tokens; arrows move", name())
    });
    let at = move |row: usize| rows.with_untracked(|rows| rows.get(row).map(|row| row.latent));
    view! {
        <section class="card" aria-labelledby="h-layer">
            <h2 id="h-layer">{name}<span class="quiet">" on every token"</span></h2>
            <div class="flow-map named">
                {latent_axis(shown, chosen, rows)}
                <Map id="flow-layer" label=label cells=cells
                    point=Callback::new(move |(token, row)| chosen.point(Some(token), None, at(row)))
                    lock=Callback::new(move |(token, row)| chosen.lock(Some(token), None, at(row)))
                    leave=Callback::new(move |()| chosen.point(None, None, None)) />
                {axis_x(n_tokens, 10, |token| token.to_string())}
            </div>
            <p class="axis-note">
                "its strongest latents in the text, at most "{ROWS}"; the strongest is "
                {move || figures::value(f64::from(rows.with(|rows| largest(rows))))}
            </p>
        </section>
    }
}

fn place_of(rows: Memo<Vec<Row>>, latent: Option<u32>) -> Option<usize> {
    rows.with(|rows| rows.iter().position(|row| Some(row.latent) == latent))
}
