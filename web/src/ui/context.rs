//! What all components share: the address, the adapter found, notices; and loading data for them.

use std::future::Future;
use std::task::{Context, Poll, Waker};

use leptos::prelude::*;
use leptos::task::spawn_local;
use shared::pack::Index;
use wasm_bindgen::JsValue;

use crate::data;
use crate::state::address::{Address, Route};
use crate::state::choice::{Choice, Probe};
use crate::state::list::ListView;
use crate::state::load::{Failure, Load};

/// Shared by every component.
#[derive(Clone, Copy)]
pub(crate) struct Ctx {
    /// Where the reader is.
    pub(crate) address: RwSignal<Address>,
    /// What looking for an adapter found.
    pub(crate) probe: RwSignal<Option<Probe>>,
    /// The backend used last, once something was encoded.
    pub(crate) used: RwSignal<Option<Choice>>,
    /// The list as it was last seen; next and previous follow it.
    pub(crate) last_list: RwSignal<(String, ListView)>,
    /// Whether the help is open.
    pub(crate) help: RwSignal<bool>,
    /// A short message for everyone, read aloud too.
    pub(crate) notice: RwSignal<String>,
    /// Counts up when the reader asks to try again.
    pub(crate) retry: RwSignal<u32>,
    /// Whether the window is as narrow as a phone.
    pub(crate) narrow: RwSignal<bool>,
}

/// The context; every component lies inside the one that provides it.
pub(crate) fn ctx() -> Ctx {
    expect_context()
}

impl Ctx {
    /// Makes the context from the window's address and follows it.
    pub(crate) fn new() -> Self {
        let read = || Address::parse(&window().location().hash().unwrap_or_default());
        let narrow = || window().inner_width().ok().and_then(|w| w.as_f64()).is_some_and(|w| w < 720.0);
        let ctx = Self {
            address: RwSignal::new(read()),
            probe: RwSignal::new(None),
            used: RwSignal::new(None),
            last_list: RwSignal::default(),
            help: RwSignal::new(false),
            notice: RwSignal::default(),
            retry: RwSignal::new(0),
            narrow: RwSignal::new(narrow()),
        };
        let handle = window_event_listener(leptos::ev::hashchange, move |_| ctx.address.set(read()));
        let resized = window_event_listener(leptos::ev::resize, move |_| {
            if ctx.narrow.get_untracked() != narrow() {
                ctx.narrow.set(narrow());
            }
        });
        on_cleanup(move || {
            handle.remove();
            resized.remove();
        });
        ctx
    }

    /// The address of `route`, keeping the backend asked for.
    pub(crate) fn href(&self, route: Route) -> String {
        let backend = self.address.with(|a| a.backend);
        Address { route, backend }.to_string()
    }

    /// Goes to `route`, with an entry in the history.
    pub(crate) fn go(&self, route: Route) {
        let backend = self.address.with_untracked(|a| a.backend);
        // The event of the changed hash sets the address.
        let _ = window().location().set_hash(&Address { route, backend }.to_string());
    }

    /// Changes the state of this page without an entry in the history.
    pub(crate) fn replace(&self, route: Route) {
        let backend = self.address.with_untracked(|a| a.backend);
        let address = Address { route, backend };
        if let Ok(history) = window().history() {
            let _ = history.replace_state_with_url(&JsValue::NULL, "", Some(&address.to_string()));
        }
        self.address.set(address);
    }

    /// Shows `text` for a while.
    pub(crate) fn say(&self, text: impl Into<String>) {
        let notice = self.notice;
        let text = text.into();
        notice.set(text.clone());
        set_timeout(
            move || {
                if notice.with_untracked(|n| *n == text) {
                    notice.set(String::new());
                }
            },
            std::time::Duration::from_secs(4),
        );
    }

    /// Puts `text` on the clipboard and says so.
    pub(crate) fn copy(&self, what: &'static str, text: String) {
        let ctx = *self;
        spawn_local(async move {
            let promise = window().navigator().clipboard().write_text(&text);
            match wasm_bindgen_futures::JsFuture::from(promise).await {
                Ok(_) => ctx.say(format!("{what} copied")),
                Err(_) => ctx.say(format!("{what} not copied: the browser does not allow it here")),
            }
        });
    }

    /// Goes to the latent `step` places on in the list as it was last seen.
    pub(crate) fn step_latent(&self, pack: String, latent: u32, step: isize) {
        let ctx = *self;
        spawn_local(async move {
            let Ok(found) = index_of(&pack).await else { return };
            let (list_pack, view) = ctx.last_list.get_untracked();
            let view = if list_pack == pack { view } else { ListView::default() };
            if let Some(next) = ListView::neighbour(&view.select(&found), latent, step) {
                ctx.go(Route::feature(&pack, next));
            }
        });
    }

    /// Goes to the texts of a pack: across its layers where it has several, else where a text is encoded.
    pub(crate) fn go_and_try(&self, pack: String) {
        let ctx = *self;
        spawn_local(async move {
            let layers = data::pack(&pack).await.is_ok_and(|found| found.manifest.flow.is_some());
            ctx.go(if layers { Route::flow(&pack) } else { Route::try_it(&pack) });
        });
    }

    /// Goes to any latent that fires.
    pub(crate) fn random_latent(&self, pack: String) {
        let ctx = *self;
        spawn_local(async move {
            let Ok(found) = index_of(&pack).await else { return };
            let alive: Vec<u32> =
                (0u32..).zip(&found.density).filter(|(_, d)| **d > 0.0).map(|(latent, _)| latent).collect();
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in a list")]
            #[expect(clippy::cast_precision_loss, reason = "a place in a list")]
            let place = (js_sys::Math::random() * alive.len() as f64) as usize;
            if let Some(&latent) = alive.get(place) {
                ctx.go(Route::feature(&pack, latent));
            }
        });
    }
}

async fn index_of(pack: &str) -> Result<std::sync::Arc<Index>, Failure> {
    let pack = data::pack(pack).await?;
    data::index(&pack).await
}

/// Data for `key`, fetched again whenever the key changes or the reader asks to try again.
///
/// What is already at hand is there at once, without a flash of "loading".
pub(crate) fn load<K, T, F>(
    key: impl Fn() -> K + Send + Sync + 'static,
    fetch: impl Fn(K) -> F + 'static,
) -> ReadSignal<Load<T>>
where
    K: PartialEq + Clone + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
    F: Future<Output = Result<T, Failure>> + 'static,
{
    let ctx = ctx();
    let key = Memo::new(move |_| key());
    let (value, set_value) = signal(Load::Loading);
    let turn = StoredValue::new(0u64);
    Effect::new(move |_| {
        ctx.retry.track();
        let mut future = Box::pin(fetch(key.get()));
        let this = turn.get_value() + 1;
        turn.set_value(this);
        match untrack(|| future.as_mut().poll(&mut Context::from_waker(Waker::noop()))) {
            Poll::Ready(result) => set_value.set(result.into()),
            Poll::Pending => {
                set_value.set(Load::Loading);
                spawn_local(async move {
                    let result = future.await;
                    // A later key, or another page, may have overtaken this one.
                    if turn.try_get_value() == Some(this) {
                        set_value.set(result.into());
                    }
                });
            }
        }
    });
    value
}
