//! The keyboard: one listener for the whole page, and the dialog that lists what it does.

use std::time::Duration;

use leptos::html;
use leptos::prelude::*;
use wasm_bindgen::JsCast;
use web_sys::{HtmlElement, KeyboardEvent};

use super::app::toggle_theme;
use super::context::{Ctx, ctx};
use super::{flow, try_it};
use crate::state::address::Route;

const HELP: [(&str, &str); 11] = [
    ("/", "search the features"),
    ("j  k", "next, previous feature (in the order of the list)"),
    ("r", "a random feature"),
    ("←  →", "next, previous token; in a map ↑ ↓ too"),
    ("Enter", "lock a token, or a place of a map"),
    ("Esc", "unlock; close"),
    ("g o", "go to the packs"),
    ("g f", "go to the features"),
    ("g t", "go and try, or across the layers"),
    ("d", "light or dark"),
    ("?", "this help"),
];

/// Listens for keys as long as the page lives.
pub(super) fn listen(ctx: Ctx) {
    let going = RwSignal::new(false);
    let handle = window_event_listener(leptos::ev::keydown, move |event| {
        if event.ctrl_key() || event.meta_key() || event.alt_key() || typing(&event) {
            return;
        }
        let key = event.key();
        if going.get_untracked() {
            going.set(false);
            if go(ctx, &key) {
                event.prevent_default();
                return;
            }
        }
        if key == "g" {
            going.set(true);
            set_timeout(move || going.set(false), Duration::from_millis(1500));
            return;
        }
        if act(ctx, &key, &event) {
            event.prevent_default();
        }
    });
    on_cleanup(move || handle.remove());
}

/// Whether the key belongs to a field.
fn typing(event: &KeyboardEvent) -> bool {
    let target = event.target().and_then(|t| t.dyn_into::<web_sys::Element>().ok());
    target.is_some_and(|t| ["INPUT", "SELECT", "TEXTAREA"].contains(&t.tag_name().as_str()))
}

/// The second key after `g`.
fn go(ctx: Ctx, key: &str) -> bool {
    let pack = ctx.address.with_untracked(|a| a.route.pack().map(str::to_owned));
    let route = match (key, pack) {
        ("o", _) => Route::Overview,
        ("f", Some(pack)) => Route::list(&pack),
        ("t", Some(pack)) => {
            ctx.go_and_try(pack);
            return true;
        }
        _ => return false,
    };
    ctx.go(route);
    true
}

fn act(ctx: Ctx, key: &str, event: &KeyboardEvent) -> bool {
    let route = ctx.address.with_untracked(|a| a.route.clone());
    match (key, &route) {
        ("?", _) => ctx.help.update(|open| *open = !*open),
        ("d", _) => toggle_theme(ctx),
        ("/", _) => return search(ctx, &route),
        ("j", Route::Feature { pack, latent }) => ctx.step_latent(pack.clone(), *latent, 1),
        ("k", Route::Feature { pack, latent }) => ctx.step_latent(pack.clone(), *latent, -1),
        ("j" | "k", Route::List { .. }) => return step_row(key == "j"),
        ("r", _) => match route.pack() {
            Some(pack) => ctx.random_latent(pack.to_owned()),
            None => return false,
        },
        (_, Route::Try { .. }) => return try_it::key(event),
        (_, Route::Flow { .. }) => return flow::key(ctx, event),
        _ => return false,
    }
    true
}

/// Moves the focus to the search field, which only the list has.
fn search(ctx: Ctx, route: &Route) -> bool {
    let Some(pack) = route.pack() else { return false };
    if !matches!(route, Route::List { .. }) {
        ctx.go(Route::list(pack));
    }
    focus_when_there("search", 20);
    true
}

fn focus_when_there(id: &'static str, tries: u32) {
    let found = document().get_element_by_id(id).and_then(|e| e.dyn_into::<HtmlElement>().ok());
    if let Some(element) = found {
        let _ = element.focus();
    } else if tries > 0 {
        set_timeout(move || focus_when_there(id, tries - 1), Duration::from_millis(50));
    }
}

/// Moves the focus to the next or previous row of the list.
fn step_row(forward: bool) -> bool {
    let Ok(rows) = document().query_selector_all(".rows a") else { return false };
    let rows: Vec<HtmlElement> =
        (0..rows.length()).filter_map(|i| rows.item(i)?.dyn_into::<HtmlElement>().ok()).collect();
    let focused = document().active_element();
    let at = rows.iter().position(|row| focused.as_ref() == Some(row.as_ref()));
    let next = match (at, forward) {
        (None, _) => Some(0),
        (Some(i), true) => Some(i + 1),
        (Some(i), false) => i.checked_sub(1),
    };
    if let Some(row) = next.and_then(|i| rows.get(i)) {
        let _ = row.focus();
    }
    true
}

/// The list of keys.
#[component]
pub(super) fn Help() -> impl IntoView {
    let ctx = ctx();
    let dialog: NodeRef<html::Dialog> = NodeRef::new();
    Effect::new(move |_| {
        let (open, Some(dialog)) = (ctx.help.get(), dialog.get()) else { return };
        if open && !dialog.open() {
            let _ = dialog.show_modal();
        } else if !open && dialog.open() {
            dialog.close();
        }
    });
    view! {
        <dialog node_ref=dialog aria-labelledby="help-title" on:close=move |_| ctx.help.set(false)>
            <h2 id="help-title">"Keyboard"</h2>
            <dl class="keys">
                {HELP
                    .map(|(keys, does)| {
                        let keys = keys.split_whitespace().map(|k| view! { <kbd>{k}</kbd>" " }).collect_view();
                        view! { <div><dt>{keys}</dt><dd>{does}</dd></div> }
                    })
                    .collect_view()}
            </dl>
            <button type="button" on:click=move |_| ctx.help.set(false)>"Close"</button>
        </dialog>
    }
}
