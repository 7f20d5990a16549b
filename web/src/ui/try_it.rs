//! A text, encoded here and now: every token lights up with the latents that fire on it.

use std::sync::Arc;

use leptos::html;
use leptos::prelude::*;
use shared::pack::{Index, Text, TextEntry};
use wasm_bindgen::JsCast;
use web_sys::{HtmlElement, KeyboardEvent};

use super::context::{ctx, load};
use super::parts::{Choosable, TextPicker, when};
use super::tokens::{Legend, style};
use super::try_panel::{CodesTable, Panel};
use crate::backend::{self, Outcome};
use crate::data::{self, Pack};
use crate::state::address::{Route, TryView};
use crate::state::choice::Kind;
use crate::state::{encoded, figures, words};

/// What is drawn from.
#[derive(Clone)]
struct Shown {
    pack: Arc<Pack>,
    index: Arc<Index>,
    entry: TextEntry,
    outcome: Arc<Outcome>,
}

/// The page.
#[component]
pub(super) fn TryIt(pack: String) -> impl IntoView {
    let ctx = ctx();
    let name = pack.clone();
    let texts = load(
        move || name.clone(),
        |name| async move {
            let pack = data::pack(&name).await?;
            let texts = data::texts(&pack).await?;
            Ok((pack, texts))
        },
    );
    let view = Memo::new(move |_| {
        ctx.address
            .with(|a| if let Route::Try { view, .. } = &a.route { view.clone() } else { TryView::default() })
    });
    let change = Callback::new(move |view: TryView| ctx.replace(Route::Try { pack: pack.clone(), view }));
    view! {
        {move || {
            when(
                texts.get(),
                |(pack, texts): (Arc<Pack>, Arc<Vec<TextEntry>>)| {
                    if texts.is_empty() {
                        return view! { <p class="quiet">"This pack comes without texts to try."</p> }.into_any();
                    }
                    view! {
                        <h1>"Try "{pack.manifest.title.clone()}</h1>
                        <Picker texts=texts.clone() view=view change=change />
                        <Encode pack=pack texts=texts view=view change=change />
                    }
                    .into_any()
                },
            )
        }}
    }
}

/// The text the address names, else the first.
fn chosen(texts: &[TextEntry], view: &TryView) -> Option<TextEntry> {
    let named = view.text.as_ref().and_then(|id| texts.iter().find(|t| t.id == *id));
    named.or(texts.first()).cloned()
}

#[component]
fn Picker(texts: Arc<Vec<TextEntry>>, view: Memo<TryView>, change: Callback<TryView>) -> impl IntoView {
    let choose = Callback::new(move |id| {
        change.run(TryView { text: Some(id), token: None, ..view.get_untracked() });
    });
    let texts = texts.iter().map(|TextEntry { id, title, source, .. }| Choosable {
        id: id.clone(),
        title: title.clone(),
        source: source.clone(),
    });
    let texts: Vec<Choosable> = texts.collect();
    view! {
        <TextPicker texts=texts named=move || view.get().text choose=choose />
    }
}

#[component]
fn Encode(
    pack: Arc<Pack>,
    texts: Arc<Vec<TextEntry>>,
    view: Memo<TryView>,
    change: Callback<TryView>,
) -> impl IntoView {
    let ctx = ctx();
    let progress = RwSignal::new(0.0f64);
    let entry = Memo::new(move |_| chosen(&texts, &view.get()));
    let shown = load(
        move || (entry.get(), ctx.address.with(|a| a.backend), ctx.probe.get()),
        move |(entry, wish, probe)| {
            let pack = pack.clone();
            async move {
                let (Some(entry), Some(probe)) = (entry, probe) else { return std::future::pending().await };
                progress.set(0.0);
                let text: Arc<Text> = data::text(&pack, &entry).await?;
                let index = data::index(&pack).await?;
                let outcome = backend::encode(&pack, &text, wish, &probe, |p| progress.set(p)).await?;
                ctx.used.set(Some(outcome.choice.clone()));
                Ok(Shown { pack, index, entry, outcome: Arc::new(outcome) })
            }
        },
    );
    view! {
        <Show when=move || shown.with(|s| matches!(s, crate::state::load::Load::Loading))>
            <progress aria-label="Encoding" max="1" prop:value=move || progress.get()></progress>
        </Show>
        {move || when(shown.get(), |shown| view! { <Board shown=shown view=view change=change /> }.into_any())}
    }
}

/// The text and the panel beside it.
#[component]
fn Board(shown: Shown, view: Memo<TryView>, change: Callback<TryView>) -> impl IntoView {
    let Shown { pack, index, entry, outcome } = shown;
    let n_tokens = outcome.encoded.n_tokens();
    let hover_token = RwSignal::new(None::<usize>);
    let hover_latent = RwSignal::new(None::<u32>);
    let locked = Memo::new(move |_| view.get().token.map(|t| t as usize).filter(|&t| t < n_tokens));
    let token = Memo::new(move |_| locked.get().or(hover_token.get()));
    let latent = Memo::new(move |_| hover_latent.get().or(view.get().latent));
    let found = outcome.clone();
    let values = Memo::new(move |_| match latent.get() {
        Some(latent) => found.encoded.latent(latent),
        None => found.encoded.peaks(),
    });
    let largest_of = index.clone();
    let strongest = outcome.encoded.strongest();
    let largest = Memo::new(move |_| match latent.get() {
        Some(latent) => {
            let seen = largest_of.max_activation.get(latent as usize).copied().unwrap_or(0.0);
            values.get().into_iter().fold(seen, f32::max)
        }
        None => strongest,
    });
    let what = move || match latent.get() {
        Some(latent) => format!("#{latent}"),
        None => "the strongest latent of each token".to_owned(),
    };
    view! {
        <Facts outcome=outcome.clone() />
        <div class="board">
            <section class="card" aria-labelledby="h-text">
                <h2 id="h-text">{entry.title.clone()}<span class="quiet">" shaded by "{what}</span>
                    <Show when=move || view.get().latent.is_some()>
                        <button type="button" class="small" on:click=move |_| change.run(TryView { latent: None, ..view.get_untracked() })>"Clear"</button>
                    </Show>
                </h2>
                <Strip entry=entry.clone() outcome=outcome.clone() values=values largest=largest locked=locked token=token
                    hover=hover_token view=view change=change />
                <Legend scale="the largest of what is shown, or on the corpus".to_owned() largest=largest />
            </section>
            <Panel pack=pack index=index words=entry.words.clone() outcome=outcome.clone() token=token locked=locked hover=hover_latent view=view change=change />
        </div>
        <CodesTable words=entry.words outcome=outcome />
    }
}

/// What was computed, where, and how long it took.
#[component]
fn Facts(outcome: Arc<Outcome>) -> impl IntoView {
    let Outcome { encoded, choice, encode_ms, ready_ms } = &*outcome;
    let n = (0..encoded.n_tokens()).filter(|&t| !encoded.skipped(t)).count();
    let backend = if choice.kind == Kind::Gpu { "gpu" } else { "cpu" };
    view! {
        <p class="facts-line" role="status" id="facts" data-backend=backend>
            <strong>{choice.label()}</strong>" encoded "{n}" tokens in "{figures::milliseconds(*encode_ms)}
            {(*ready_ms > 1.0).then(|| format!(", after {} to get ready", figures::milliseconds(*ready_ms)))}
            "; L0 "{figures::value(encoded.mean_l0())}". "<span class="quiet">{choice.reason.clone()}</span>
        </p>
    }
}

/// The tokens: hovering previews, clicking locks, arrows walk.
#[component]
fn Strip(
    entry: TextEntry,
    outcome: Arc<Outcome>,
    values: Memo<Vec<f32>>,
    largest: Memo<f32>,
    locked: Memo<Option<usize>>,
    token: Memo<Option<usize>>,
    hover: RwSignal<Option<usize>>,
    view: Memo<TryView>,
    change: Callback<TryView>,
) -> impl IntoView {
    let n_tokens = entry.words.len();
    let lock = move |token: Option<usize>| {
        let token = token.and_then(|t| u32::try_from(t).ok());
        change.run(TryView { token, ..view.get_untracked() });
    };
    let strip: NodeRef<html::Div> = NodeRef::new();
    let on_key = move |event: KeyboardEvent| {
        let at = token.get_untracked().unwrap_or(0);
        if let Some(next) = encoded::step(&event.key(), at, n_tokens) {
            // The first press enters the text at its beginning.
            let next = if token.get_untracked().is_none() { 0 } else { next };
            event.prevent_default();
            event.stop_propagation();
            if locked.get_untracked().is_some() {
                lock(Some(next));
            }
            hover.set(Some(next));
            let option = strip.get_untracked().and_then(|s| s.children().item(u32::try_from(next).ok()?));
            if let Some(option) = option.and_then(|o| o.dyn_into::<HtmlElement>().ok()) {
                let _ = option.focus();
            }
        } else if matches!(event.key().as_str(), "Enter" | " ") {
            event.prevent_default();
            lock(if locked.get_untracked() == Some(at) { None } else { Some(at) });
        } else if event.key() == "Escape" {
            lock(None);
            hover.set(None);
        }
    };
    let tokens = entry.words.iter().enumerate().map(|(t, word)| {
        let skipped = outcome.encoded.skipped(t);
        let active = outcome.encoded.token(t).len();
        let text = words::in_text(word);
        let label = if skipped {
            format!("token {t}, {}, not encoded", words::alone(word))
        } else {
            format!("token {t}, {}, {active} latents", words::alone(word))
        };
        let value = move || values.with(|v| v.get(t).copied().unwrap_or(0.0));
        let is_here = move || token.get() == Some(t);
        let is_stop = move || token.get().unwrap_or(0) == t;
        view! {
            <span role="option" class="tok" class:on=move || { value() > 0.0 } class:skipped=skipped class:here=is_here
                class:locked=move || locked.get() == Some(t)
                aria-label=label aria-selected=move || (locked.get() == Some(t)).to_string()
                tabindex=move || if is_stop() { "0" } else { "-1" }
                style=move || style(value(), largest.get())
                on:mouseenter=move |_| hover.set(Some(t))
                on:focus=move |_| hover.set(Some(t))
                on:click=move |_| lock(if locked.get_untracked() == Some(t) { None } else { Some(t) })
            >{text}</span>
            {words::ends_line(word).then(|| view! { <br /> })}
        }
    });
    let tokens = tokens.collect_view();
    view! {
        <div class="strip" id="strip" role="listbox" aria-label="Tokens" node_ref=strip on:keydown=on_key
            on:mouseleave=move |_| hover.set(None)>{tokens}</div>
    }
}

/// Arrow keys pressed elsewhere on the page go to the text.
pub(super) fn key(event: &KeyboardEvent) -> bool {
    if !matches!(event.key().as_str(), "ArrowLeft" | "ArrowRight" | "Escape") {
        return false;
    }
    let stop = document().query_selector("#strip [tabindex='0']").ok().flatten();
    let Some(stop) = stop.and_then(|s| s.dyn_into::<HtmlElement>().ok()) else { return false };
    if event.key() == "Escape" {
        // Clicking the locked token unlocks it.
        let locked = document().query_selector("#strip .locked").ok().flatten();
        if let Some(locked) = locked.and_then(|l| l.dyn_into::<HtmlElement>().ok()) {
            locked.click();
        }
        return true;
    }
    let _ = stop.focus();
    true
}
