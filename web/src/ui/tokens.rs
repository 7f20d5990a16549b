//! A token with its activation: a tint, a bar under it, and the value in words.

use leptos::prelude::*;

use crate::state::{figures, shade, words};

/// The custom properties that `style.css` draws an activation from.
pub(crate) fn style(value: f32, largest: f32) -> String {
    format!("--a: {:.1}%; --b: {:.1}%", 100.0 * shade::strength(value, largest), shade::bar(value, largest))
}

/// A token of an example.
pub(crate) fn token(word: &str, value: f32, largest: f32, peak: bool) -> AnyView {
    let text = words::in_text(word);
    if value <= 0.0 {
        return view! { <span class="tok" class:peak=peak>{text}</span> }.into_any();
    }
    view! {
        <span class="tok on" class:peak=peak style=style(value, largest) title=figures::value(f64::from(value))>
            {text}
        </span>
    }
    .into_any()
}

/// What the tints and bars mean.
#[component]
pub(crate) fn Legend(
    /// What the largest activation belongs to.
    scale: String,
    /// The largest activation.
    #[prop(into)]
    largest: Signal<f32>,
) -> impl IntoView {
    view! {
        <p class="legend">
            <span aria-hidden="true" class="ramp">
                {[0.1f32, 0.25, 0.5, 0.75, 1.0]
                    .map(|r| view! { <span class="tok on" style=style(r, 1.0)>"\u{a0}\u{a0}"</span> })
                    .collect_view()}
            </span>
            "tint and bar: 0 to "{move || figures::value(f64::from(largest.get()))}", "{scale}
        </p>
    }
}
