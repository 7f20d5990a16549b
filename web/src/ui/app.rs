//! The frame of every page: header, footer, help, theme, notices.

use leptos::prelude::*;
use leptos::task::spawn_local;
use wasm_bindgen::JsCast;

use super::context::{Ctx, ctx, load};
use super::{feature, flow, keys, list, overview, selftest, try_it};
use crate::backend;
use crate::data;
use crate::state::address::Route;
use crate::state::choice::{Choice, Kind, Probe};

/// The whole page.
#[component]
pub(super) fn App() -> impl IntoView {
    let ctx = Ctx::new();
    provide_context(ctx);
    keys::listen(ctx);
    restore_theme();
    // The browser tests pull the device away with this event, as a crash of the driver would.
    let lost = window_event_listener_untyped("stratascope-lose-device", |_| backend::lose_device());
    on_cleanup(move || lost.remove());
    register_offline();
    spawn_local(async move { ctx.probe.set(Some(backend::probe().await)) });
    // A page is drawn anew only when another kind of page or another pack is shown, not for every latent.
    let page = Memo::new(move |_| {
        ctx.address.with(|a| match &a.route {
            Route::Overview => (0, String::new()),
            Route::List { pack, .. } => (1, pack.clone()),
            Route::Feature { pack, .. } => (2, pack.clone()),
            Route::Try { pack, .. } => (3, pack.clone()),
            Route::SelfTest => (4, String::new()),
            Route::Flow { pack, .. } => (5, pack.clone()),
            Route::Unknown(path) => (6, path.clone()),
        })
    });
    Effect::new(move |before: Option<(u8, String)>| {
        let now = page.get();
        if before.is_some_and(|before| before != now)
            && let Some(main) = document().get_element_by_id("main")
        {
            window().scroll_to_with_x_and_y(0.0, 0.0);
            // Who pressed `/` is already in the search field of the new page.
            let searching = document().active_element().is_some_and(|element| element.id() == "search");
            if let Ok(main) = main.dyn_into::<web_sys::HtmlElement>()
                && !searching
            {
                let _ = main.focus();
            }
        }
        now
    });
    Effect::new(move |_| document().set_title(&ctx.address.with(|a| title(&a.route))));
    view! {
        <a class="skip" href="#main" on:click=|event| skip_to_main(&event)>"Skip to content"</a>
        <Header />
        <main id="main" tabindex="-1">
            {move || match page.get() {
                (0, _) => view! { <overview::Overview /> }.into_any(),
                (1, pack) => view! { <list::List pack=pack /> }.into_any(),
                (2, pack) => view! { <feature::FeaturePage pack=pack /> }.into_any(),
                (3, pack) => view! { <try_it::TryIt pack=pack /> }.into_any(),
                (4, _) => view! { <selftest::SelfTest /> }.into_any(),
                (5, pack) => view! { <flow::FlowPage pack=pack /> }.into_any(),
                (_, path) => view! { <Nowhere path=path /> }.into_any(),
            }}
        </main>
        <footer>
            <span>"Stratascope "{env!("CARGO_PKG_VERSION")}</span>
            <span>"Static files; nothing you do here leaves this machine."</span>
            <a href=move || ctx.href(Route::SelfTest)>"Does this machine compute right?"</a>
            <span>"Press "<kbd>"?"</kbd>" for the keyboard."</span>
        </footer>
        <keys::Help />
        <div class="notice" role="status" aria-live="polite">{move || ctx.notice.get()}</div>
    }
}

fn skip_to_main(event: &leptos::ev::MouseEvent) {
    // The fragment of the address belongs to the router.
    event.prevent_default();
    if let Some(main) =
        document().get_element_by_id("main").and_then(|m| m.dyn_into::<web_sys::HtmlElement>().ok())
    {
        let _ = main.focus();
    }
}

fn title(route: &Route) -> String {
    match route {
        Route::Overview | Route::Unknown(_) => "Stratascope".to_owned(),
        Route::List { pack, .. } => format!("Features of {pack} · Stratascope"),
        Route::Feature { pack, latent } => format!("#{latent} of {pack} · Stratascope"),
        Route::Try { pack, .. } => format!("Try {pack} · Stratascope"),
        Route::Flow { pack, .. } => format!("Flow of {pack} · Stratascope"),
        Route::SelfTest => "Self-test · Stratascope".to_owned(),
    }
}

#[component]
fn Header() -> impl IntoView {
    let ctx = ctx();
    let pack = Memo::new(move |_| ctx.address.with(|a| a.route.pack().map(str::to_owned)));
    // A pack of several layers has its texts across them.
    let layers = load(
        move || pack.get(),
        |pack| async move {
            match pack {
                Some(pack) => Ok(data::pack(&pack).await?.manifest.flow.is_some()),
                None => Ok(false),
            }
        },
    );
    let link = move |name: &'static str, route: Route, is_here: fn(&Route) -> bool| {
        let here = move || ctx.address.with(|a| is_here(&a.route)).then_some("page");
        view! { <a href=move || ctx.href(route.clone()) aria-current=here>{name}</a> }
    };
    view! {
        <header>
            <a class="brand" href=move || ctx.href(Route::Overview)>
                <svg viewBox="0 0 20 20" aria-hidden="true">
                    <path d="M2 6l8-4 8 4-8 4z"></path>
                    <path d="M2 10l8 4 8-4M2 14l8 4 8-4" fill="none"></path>
                </svg>
                "Stratascope"
            </a>
            <nav aria-label="Pages">
                {link("Packs", Route::Overview, |r| matches!(r, Route::Overview))}
                {move || {
                    pack.get()
                        .map(|pack| {
                            view! {
                                {link("Features", Route::list(&pack), |r| matches!(r, Route::List { .. } | Route::Feature { .. }))}
                                {if layers.get().ready() == Some(&true) {
                                    link("Flow", Route::flow(&pack), |r| matches!(r, Route::Flow { .. })).into_any()
                                } else {
                                    link("Try it", Route::try_it(&pack), |r| matches!(r, Route::Try { .. })).into_any()
                                }}
                            }
                        })
                }}
            </nav>
            <div class="tools">
                <BackendChip />
                <button type="button" class="icon" on:click=move |_| toggle_theme(ctx) aria-label="Light or dark" title="Light or dark (d)">
                    <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 2a8 8 0 1 0 0 16z"></path><circle cx="10" cy="10" r="7.2" fill="none"></circle></svg>
                </button>
                <button type="button" class="icon" on:click=move |_| ctx.help.set(true) aria-label="Keyboard help" title="Keyboard (?)">"?"</button>
            </div>
        </header>
    }
}

/// The backend in use and why; it opens to the whole reason.
#[component]
fn BackendChip() -> impl IntoView {
    let ctx = ctx();
    let choice = Memo::new(move |_| {
        let wish = ctx.address.with(|a| a.backend);
        ctx.used.get().or_else(|| ctx.probe.with(|p| p.as_ref().map(|p| Choice::make(wish, p))))
    });
    let adapter = move || {
        ctx.probe.with(|p| match p {
            None => "Looking for an adapter.".to_owned(),
            Some(Probe::Adapter { name, software }) => {
                format!("Adapter: {name}{}.", if *software { " (software)" } else { "" })
            }
            Some(Probe::None(reason)) => format!("No adapter: {reason}."),
        })
    };
    view! {
        <details class="backend" data-backend=move || choice.get().map(|c| if c.kind == Kind::Gpu { "gpu" } else { "cpu" })>
            <summary>{move || choice.get().map_or("…", |c| c.label())}</summary>
            <div class="popover">
                <p>{move || choice.get().map(|c| c.reason)}</p>
                <p>{adapter}</p>
                <p>"Both backends give the same active latents. Add backend=cpu or backend=gpu to the address to choose."</p>
            </div>
        </details>
    }
}

#[component]
fn Nowhere(path: String) -> impl IntoView {
    let ctx = ctx();
    view! {
        <h1>"There is no such page"</h1>
        <p>"The address "<code>{path}</code>" leads nowhere. "<a href=move || ctx.href(Route::Overview)>"All packs"</a></p>
    }
}

/// Changes between light and dark and remembers it.
pub(super) fn toggle_theme(ctx: Ctx) {
    let dark = match theme() {
        Some(theme) => theme == "dark",
        None => window()
            .match_media("(prefers-color-scheme: dark)")
            .ok()
            .flatten()
            .is_some_and(|query| query.matches()),
    };
    let theme = if dark { "light" } else { "dark" };
    set_theme(theme);
    if let Ok(Some(storage)) = window().local_storage() {
        let _ = storage.set_item("theme", theme);
    }
    ctx.say(format!("{} theme", if dark { "Light" } else { "Dark" }));
}

fn theme() -> Option<String> {
    document().document_element()?.get_attribute("data-theme")
}

fn set_theme(theme: &str) {
    if let Some(root) = document().document_element() {
        let _ = root.set_attribute("data-theme", theme);
    }
}

fn restore_theme() {
    let stored = window().local_storage().ok().flatten().and_then(|s| s.get_item("theme").ok().flatten());
    if let Some(theme @ ("light" | "dark")) = stored.as_deref() {
        set_theme(theme);
    }
}

/// Keeps what was visited for when there is no connection. Browsers allow it on secure origins only.
///
/// `index.html` sees to what was fetched before the worker took over.
fn register_offline() {
    if window().is_secure_context() {
        // Without it everything works but a reload offline.
        let _ = window().navigator().service_worker().register("./sw.js");
    }
}
