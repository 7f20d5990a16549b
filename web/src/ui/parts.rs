//! Small things every page uses: failures, waiting, chips, the button that copies.

use leptos::prelude::*;

use super::context::ctx;
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

/// Tokens that stand in a row.
#[component]
pub(crate) fn Words(words: Vec<String>) -> impl IntoView {
    let words = words.into_iter().map(|word| view! { <span class="word">{words::alone(&word)}</span> });
    view! { <span class="words">{words.collect_view()}</span> }
}
