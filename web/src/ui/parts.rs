//! Small things every page uses: failures, waiting, chips, the button that copies.

use leptos::prelude::*;

use super::context::ctx;
use super::feature::copy_link;
use crate::state::load::{Failure, Load};
use crate::state::words;

/// What is ready, or a note of why it is not.
pub(crate) fn when<T>(load: Load<T>, ready: impl FnOnce(T) -> AnyView) -> AnyView {
    match load {
        Load::Ready(value) => ready(value),
        Load::Failed(failure) => view! { <Failed failure=failure /> }.into_any(),
        Load::Loading => view! { <p class="loading" role="status">"Loading…"</p> }.into_any(),
    }
}

/// Why something is not there, what to do, and a button to try again.
#[component]
pub(crate) fn Failed(failure: Failure) -> impl IntoView {
    let ctx = ctx();
    let Failure { what, reason, hint } = failure;
    view! {
        <div class="failure" role="alert">
            <p><strong>{what}</strong>" failed: "{reason}"."</p>
            <p>{hint}</p>
            <button type="button" on:click=move |_| ctx.retry.update(|n| *n += 1)>"Try again"</button>
        </div>
    }
}

/// A named figure.
#[component]
pub(crate) fn Figure(
    /// What it is called.
    name: &'static str,
    /// The figure, printed.
    value: String,
    /// What it means.
    #[prop(default = "")]
    explain: &'static str,
) -> impl IntoView {
    view! {
        <div class="figure" title=explain>
            <dt>{name}</dt>
            <dd>{value}</dd>
        </div>
    }
}

/// A text to choose from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choosable {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) source: String,
}

/// A list of texts, the button that copies the address, and where the chosen text is from; between them what else a page has.
#[component]
pub(crate) fn TextPicker(
    /// The texts.
    texts: Vec<Choosable>,
    /// The one that the address names; the first where it names none of them.
    #[prop(into)]
    named: Signal<Option<String>>,
    /// Called with the id of another.
    choose: Callback<String>,
    #[prop(optional)] children: Option<Children>,
) -> impl IntoView {
    let ctx = ctx();
    let list = texts.clone();
    let current = Memo::new(move |_| {
        let named = named.get().and_then(|id| list.iter().find(|text| text.id == id));
        named.or(list.first()).cloned()
    });
    let option = |Choosable { id, title, .. }: Choosable| {
        let value = id.clone();
        let selected = move || current.get().is_some_and(|text| text.id == id);
        view! { <option value=value selected=selected>{title}</option> }
    };
    view! {
        <div class="controls">
            <label for="text">"Text"</label>
            <select id="text" on:change=move |event| choose.run(event_target_value(&event))>
                {texts.into_iter().map(option).collect_view()}
            </select>
            {children.map(|children| children())}
            <button type="button" on:click=move |_| copy_link(ctx)>"Copy link"</button>
            <span class="quiet">{move || current.get().map(|text| text.source)}</span>
        </div>
    }
}

/// Tokens that stand in a row.
#[component]
pub(crate) fn Words(words: Vec<String>) -> impl IntoView {
    let words = words.into_iter().map(|word| view! { <span class="word">{words::alone(&word)}</span> });
    view! { <span class="words">{words.collect_view()}</span> }
}
