//! A text across the layers of a multi-layer autoencoder: three maps that share a token, a layer and a latent, the latents of a
//! token as ribbons, and what is known about a latent. Pointing previews, clicking locks, arrows walk; the address has it all.

use std::sync::Arc;
use std::time::Duration;

use leptos::prelude::*;
use shared::layer_thresholds::Thinner;
use shared::pack::Index;
use shared::pack::flow::{FlowEntry, FlowLatents, FlowThresholds};
use shared::{Codes, CodesBuilder, Rows, Sae};
use wasm_bindgen::JsCast;
use web_sys::{HtmlElement, KeyboardEvent};

use super::context::{Ctx, ctx, load};
use super::flow_maps::{LatentMap, LayerMap, TokenMap};
use super::flow_panel::Panel;
use super::flow_ribbons::RibbonCard;
use super::flow_table::FlowTable;
use super::parts::{Choosable, TextPicker, when};
use super::tokens::style;
use crate::backend::{self, EncodedRows};
use crate::data::{self, Pack};
use crate::state::address::{FlowView, Route};
use crate::state::choice::{Kind, Probe, Wish};
use crate::state::flow::Flow;
use crate::state::load::{Failure, Load};
use crate::state::{figures, words};

/// How long the pointer rests before data of a latent are fetched.
const REST: Duration = Duration::from_millis(150);

/// What is drawn from.
#[derive(Clone)]
pub(super) struct Shown {
    pub(super) pack: Arc<Pack>,
    pub(super) index: Arc<Index>,
    pub(super) entry: FlowEntry,
    pub(super) flow: Arc<Flow>,
    pub(super) latents: Arc<FlowLatents>,
    /// How codes came about that were computed here, and how many cells differ from the pack's.
    made: Option<Arc<(EncodedRows, usize)>>,
}

impl Shown {
    /// The name of a layer: its number in the model, with the site where there are several.
    pub(super) fn layer_name(&self, layer: usize) -> String {
        let Some(info) = &self.pack.manifest.flow else { return layer.to_string() };
        let several = info.layers.iter().any(|other| other.tap.site != info.layers[0].tap.site);
        match info.layers.get(layer) {
            Some(layer) if several => layer.tap.to_string(),
            Some(layer) => layer.tap.layer.to_string(),
            None => String::new(),
        }
    }

    /// The first of the tokens that a latent fires on most.
    pub(super) fn fires_on(&self, latent: u32) -> String {
        let words = self.index.top_tokens.get(latent as usize).and_then(|words| words.first());
        words.map(|word| words::alone(word)).unwrap_or_default()
    }

    /// A token as it stands alone.
    pub(super) fn word(&self, token: usize) -> String {
        self.entry.words.get(token).map(|word| words::alone(word)).unwrap_or_default()
    }
}

/// A token, a layer and a latent: what the pointer is on, else what is locked, else what stands out.
#[derive(Clone, Copy)]
pub(super) struct Chosen {
    pub(super) token: Memo<usize>,
    pub(super) layer: Memo<usize>,
    pub(super) latent: Memo<Option<u32>>,
    /// What the pointer is on.
    pub(super) hover: RwSignal<(Option<usize>, Option<usize>, Option<u32>)>,
    /// What is locked.
    pub(super) view: Memo<FlowView>,
    change: Callback<FlowView>,
}

impl Chosen {
    /// Points at some of the three.
    pub(super) fn point(&self, token: Option<usize>, layer: Option<usize>, latent: Option<u32>) {
        if self.hover.get_untracked() != (token, layer, latent) {
            self.hover.set((token, layer, latent));
        }
    }

    /// Locks some of the three, and leaves the others as they are.
    pub(super) fn lock(&self, token: Option<usize>, layer: Option<usize>, latent: Option<u32>) {
        let view = self.view.get_untracked();
        let small = |n: Option<usize>| n.and_then(|n| u32::try_from(n).ok());
        self.change.run(FlowView {
            token: small(token).or(view.token),
            layer: small(layer).or(view.layer),
            latent: latent.or(view.latent),
            ..view
        });
    }
}

/// The page.
#[component]
pub(super) fn FlowPage(pack: String) -> impl IntoView {
    let ctx = ctx();
    let name = pack.clone();
    let texts = load(
        move || name.clone(),
        |name| async move {
            let pack = data::pack(&name).await?;
            let texts = data::flow_texts(&pack).await?;
            Ok((pack, texts))
        },
    );
    let view = Memo::new(move |_| {
        ctx.address.with(|a| {
            if let Route::Flow { view, .. } = &a.route { view.clone() } else { FlowView::default() }
        })
    });
    let change = Callback::new(move |view: FlowView| ctx.replace(Route::Flow { pack: pack.clone(), view }));
    view! {
        {move || {
            when(
                texts.get(),
                |(pack, texts): (Arc<Pack>, Arc<Vec<FlowEntry>>)| {
                    if texts.is_empty() {
                        return view! { <p class="quiet">"This pack comes without texts across layers."</p> }.into_any();
                    }
                    view! {
                        <h1>"Flow through "{pack.manifest.title.clone()}</h1>
                        <Picker texts=texts.clone() view=view change=change />
                        <Loaded pack=pack texts=texts view=view change=change />
                    }
                    .into_any()
                },
            )
        }}
    }
}

/// The text the address names, else the first.
fn chosen_text(texts: &[FlowEntry], view: &FlowView) -> Option<FlowEntry> {
    let named = view.text.as_ref().and_then(|id| texts.iter().find(|t| t.id == *id));
    named.or(texts.first()).cloned()
}

#[component]
fn Picker(texts: Arc<Vec<FlowEntry>>, view: Memo<FlowView>, change: Callback<FlowView>) -> impl IntoView {
    let choose = Callback::new(move |id| {
        change.run(FlowView { text: Some(id), token: None, ..view.get_untracked() });
    });
    let texts = texts.iter().map(|FlowEntry { id, title, source, .. }| Choosable {
        id: id.clone(),
        title: title.clone(),
        source: source.clone(),
    });
    let texts: Vec<Choosable> = texts.collect();
    view! {
        <TextPicker texts=texts named=move || view.get().text choose=choose>
            <label class="check">
                <input type="checkbox" id="live" prop:checked=move || view.get().live
                    on:change=move |e| change.run(FlowView { live: event_target_checked(&e), ..view.get_untracked() }) />
                "encode it here"
            </label>
        </TextPicker>
    }
}

#[component]
fn Loaded(
    pack: Arc<Pack>,
    texts: Arc<Vec<FlowEntry>>,
    view: Memo<FlowView>,
    change: Callback<FlowView>,
) -> impl IntoView {
    let ctx = ctx();
    let progress = RwSignal::new(0.0f64);
    let entry = Memo::new(move |_| chosen_text(&texts, &view.get()));
    // The backend matters only to who encodes here.
    let live =
        Memo::new(move |_| view.get().live.then(|| (ctx.address.with(|a| a.backend), ctx.probe.get())));
    let shown = load(
        move || (entry.get(), live.get()),
        move |(entry, live)| {
            let pack = pack.clone();
            async move {
                let Some(entry) = entry else { return std::future::pending().await };
                let text = data::flow_text(&pack, &entry).await?;
                let index = data::index(&pack).await?;
                let latents = data::flow_latents(&pack).await?;
                let stored = Flow::of(&text);
                let (flow, made) = match live {
                    None => (stored, None),
                    Some((_, None)) => return std::future::pending().await,
                    Some((wish, Some(probe))) => {
                        progress.set(0.0);
                        let made = encode(&pack, &entry, &stored, wish, &probe, |p| progress.set(p)).await?;
                        ctx.used.set(Some(made.choice.clone()));
                        let wrong =
                            || Failure::compute("Encoding the text", "another number of rows came back");
                        let flow = stored.clone().with_codes(made.codes.clone()).ok_or_else(wrong)?;
                        let differs = flow.n_different(&stored);
                        (flow, Some(Arc::new((made, differs))))
                    }
                };
                Ok(Shown { pack, index, entry, flow: Arc::new(flow), latents, made })
            }
        },
    );
    view! {
        <Show when=move || view.get().live && shown.with(|s| matches!(s, Load::Loading))>
            <progress aria-label="Encoding" max="1" prop:value=move || progress.get()></progress>
        </Show>
        {move || when(shown.get(), |shown| view! { <Board shown=shown view=view change=change /> }.into_any())}
    }
}

/// Encodes the vectors of a text at every layer; rows of what is skipped are empty.
async fn encode(
    pack: &Pack,
    entry: &FlowEntry,
    stored: &Flow,
    wish: Wish,
    probe: &Probe,
    progress: impl Fn(f64),
) -> Result<EncodedRows, Failure> {
    let vectors = data::flow_vectors(pack, entry).await?;
    let cells =
        || (0..stored.n_layers()).flat_map(|l| (0..stored.n_tokens()).map(move |t| stored.skipped(l, t)));
    let all = (0..stored.n_layers()).flat_map(|layer| vectors.layer(layer)).collect::<Vec<f32>>();
    let kept = all.chunks_exact(pack.manifest.sae.d_in).zip(cells()).filter(|(_, skip)| !skip);
    let x: Vec<f32> = kept.flat_map(|(row, _)| row).copied().collect();
    let mut made = backend::encode_rows(pack, &x, wish, probe, progress).await?;
    let fail = |e: shared::ShapeError| Failure::compute("Encoding the text", e);
    if let Some(thresholds) = data::flow_thresholds(pack).await? {
        let sae = data::encoder(pack).await?.without_decoder(&pack.manifest.sae);
        let sae = sae.map_err(|e| Failure::content(shared::pack::ENCODER, e))?;
        made.codes = thin(&sae, stored, &thresholds, &x, &made.codes).map_err(fail)?;
    }
    let codes = spread(&made.codes, cells()).map_err(fail)?;
    Ok(EncodedRows { codes, ..made })
}

/// Decides by each layer's own thresholds; a row for each vector that is not skipped.
fn thin(
    sae: &Sae,
    stored: &Flow,
    thresholds: &FlowThresholds,
    x: &[f32],
    codes: &Codes,
) -> Result<Codes, shared::ShapeError> {
    let (thinner, d_in) = (Thinner::new(sae), sae.dims().d_in);
    let mut all = CodesBuilder::new(codes.n_latents());
    let mut first = 0;
    for layer in 0..stored.n_layers() {
        let kept = (0..stored.n_tokens()).filter(|&token| !stored.skipped(layer, token)).count();
        let mut here = CodesBuilder::new(codes.n_latents());
        for row in first..(first + kept).min(codes.n_rows()) {
            add_row(&mut here, codes.row(row))?;
        }
        let x = Rows::new(&x[first * d_in..(first + kept) * d_in], d_in)?;
        for row in thinner.above(thresholds.layer(layer), x, &here.finish())?.iter() {
            add_row(&mut all, row)?;
        }
        first += kept;
    }
    Ok(all.finish())
}

fn add_row(to: &mut CodesBuilder, (latents, values): (&[u32], &[f32])) -> Result<(), shared::ShapeError> {
    latents.iter().zip(values).for_each(|(&latent, &value)| to.push(latent, value));
    to.end_row()
}

/// Codes with an empty row for each that is skipped.
fn spread(codes: &Codes, skip: impl Iterator<Item = bool>) -> Result<Codes, shared::ShapeError> {
    let mut rows = codes.iter();
    let mut builder = CodesBuilder::new(codes.n_latents());
    for skip in skip {
        let row = if skip { None } else { rows.next() };
        add_row(&mut builder, row.unwrap_or_default())?;
    }
    Ok(builder.finish())
}

/// Everything about one text.
#[component]
fn Board(shown: Shown, view: Memo<FlowView>, change: Callback<FlowView>) -> impl IntoView {
    let chosen = choose(&shown, view, change);
    let resting = rest(chosen.latent);
    view! {
        <Facts shown=shown.clone() />
        <Strip shown=shown.clone() chosen=chosen />
        <Here shown=shown.clone() chosen=chosen />
        <div class="flow-grid">
            <LatentMap shown=shown.clone() chosen=chosen />
            <TokenMap shown=shown.clone() chosen=chosen />
            <LayerMap shown=shown.clone() chosen=chosen />
            <RibbonCard shown=shown.clone() chosen=chosen />
        </div>
        <Panel shown=shown.clone() chosen=chosen latent=resting />
        <FlowTable shown=shown chosen=chosen />
    }
}

fn choose(shown: &Shown, view: Memo<FlowView>, change: Callback<FlowView>) -> Chosen {
    let hover = RwSignal::new((None, None, None));
    let (n_tokens, n_layers) = (shown.flow.n_tokens(), shown.flow.n_layers());
    let n_latents = shown.pack.manifest.sae.n_latents;
    // Where nothing is chosen: the strongest activation at the middle layer.
    let middle = n_layers / 2;
    let (peak, _) = shown.flow.peak(middle);
    let inside = |locked: Option<u32>, n: usize| locked.map(|l| l as usize).filter(|&l| l < n);
    let token = Memo::new(move |_| hover.get().0.or(inside(view.get().token, n_tokens)).unwrap_or(peak));
    let layer = Memo::new(move |_| hover.get().1.or(inside(view.get().layer, n_layers)).unwrap_or(middle));
    let flow = shown.flow.clone();
    let latent = Memo::new(move |_| {
        let locked = view.get().latent.filter(|&l| (l as usize) < n_latents);
        let standing_out = || {
            let here = flow.strongest(layer.get(), token.get());
            here.first().map(|first| first.0).or_else(|| flow.peak(middle).1)
        };
        hover.get().2.or(locked).or_else(standing_out)
    });
    Chosen { token, layer, latent, hover, view, change }
}

/// The latent that the pointer has rested on for a while.
fn rest(latent: Memo<Option<u32>>) -> RwSignal<Option<u32>> {
    let resting = RwSignal::new(latent.get_untracked());
    Effect::new(move |_| {
        let now = latent.get();
        set_timeout(
            move || {
                if latent.try_get_untracked() == Some(now) && resting.try_get_untracked() != Some(now) {
                    resting.try_set(now);
                }
            },
            REST,
        );
    });
    resting
}

/// Where the codes are from.
#[component]
fn Facts(shown: Shown) -> impl IntoView {
    let l0 = figures::value(shown.flow.mean_l0());
    let size = format!("{} tokens at {} layers; L0 {l0}. ", shown.flow.n_tokens(), shown.flow.n_layers());
    match shown.made.as_deref() {
        None => view! {
            <p class="facts-line" role="status" id="facts" data-backend="pack">
                <strong>"Codes of the pack: "</strong>{size}
                <span class="quiet">"Activations are in the dictionary's units, the same at every layer."</span>
            </p>
        }
        .into_any(),
        Some((made, differs)) => {
            let backend = if made.choice.kind == Kind::Gpu { "gpu" } else { "cpu" };
            let same = match differs {
                0 => "the same active latents as in the pack".to_owned(),
                n => format!("{n} places have other active latents than the pack says"),
            };
            view! {
                <p class="facts-line" role="status" id="facts" data-backend=backend data-differs=differs.to_string()>
                    <strong>{made.choice.label()}</strong>" encoded "{size}"It took "{figures::milliseconds(made.encode_ms)}
                    {(made.ready_ms > 1.0).then(|| format!(", after {} to get ready", figures::milliseconds(made.ready_ms)))}
                    "; "{same}". "<span class="quiet">{made.choice.reason.clone()}</span>
                </p>
            }
            .into_any()
        }
    }
}

/// The text, shaded by the latent at the layer.
#[component]
fn Strip(shown: Shown, chosen: Chosen) -> impl IntoView {
    let flow = shown.flow.clone();
    let values = Memo::new(move |_| {
        let (layer, latent) = (chosen.layer.get(), chosen.latent.get());
        (0..flow.n_tokens()).map(|t| latent.map_or(0.0, |l| flow.value(l, layer, t))).collect::<Vec<f32>>()
    });
    let flow = shown.flow.clone();
    let largest = Memo::new(move |_| {
        chosen.latent.get().map_or(0.0, |latent| flow.latent(latent).into_iter().fold(0.0, f32::max))
    });
    let tokens = shown.entry.words.iter().enumerate().map(|(t, word)| {
        let value = Memo::new(move |_| values.with(|v| v.get(t).copied().unwrap_or(0.0)));
        let is_here = move || chosen.token.get() == t;
        let locked = move || chosen.view.get().token.is_some_and(|locked| locked as usize == t);
        view! {
            <span class="tok" class:on=move || { value.get() > 0.0 } class:here=is_here class:locked=locked
                style=move || style(value.get(), largest.get())
                on:mouseenter=move |_| chosen.point(Some(t), None, None)
                on:click=move |_| chosen.lock(Some(t), None, None)>{words::in_text(word)}</span>
            {words::ends_line(word).then(|| view! { <br /> })}
        }
    });
    view! { <p class="strip card" id="flow-strip" on:mouseleave=move |_| chosen.point(None, None, None)>{tokens.collect_view()}</p> }
}

/// What is chosen, in words; read aloud when it is locked.
#[component]
fn Here(shown: Shown, chosen: Chosen) -> impl IntoView {
    let said = shown.clone();
    let text = move || {
        let (token, layer, latent) = (chosen.token.get(), chosen.layer.get(), chosen.latent.get());
        let place = format!("Token {token} {}, layer {}", said.word(token), said.layer_name(layer));
        if said.flow.skipped(layer, token) {
            return format!("{place}: not encoded");
        }
        let error = said.flow.errors(token).get(layer).copied().unwrap_or(0.0);
        let active = said.flow.at(layer, token).0.len();
        let value = latent.map(|latent| {
            let value = said.flow.value(latent, layer, token);
            let amount = if value > 0.0 { figures::value(f64::from(value)) } else { "silent".to_owned() };
            format!(", #{latent} (fires on {}) {amount}", said.fires_on(latent))
        });
        format!(
            "{place}{}; {active} latents, {} missed",
            value.unwrap_or_default(),
            figures::percent(f64::from(error))
        )
    };
    let any = move || {
        let view = chosen.view.get();
        view.token.is_some() || view.layer.is_some() || view.latent.is_some()
    };
    let unlock = move |_| {
        let view = chosen.view.get_untracked();
        chosen.change.run(FlowView { text: view.text, live: view.live, ..FlowView::default() });
    };
    view! {
        <p class="flow-here">
            <span id="flow-here" role="status" aria-live="polite">{text}</span>
            <Show when=any><button type="button" class="small" on:click=unlock>"Unlock (Esc)"</button></Show>
        </p>
    }
}

/// Keys pressed outside of the maps: arrows go to the map of the latent, `Esc` unlocks everything.
pub(super) fn key(ctx: Ctx, event: &KeyboardEvent) -> bool {
    match event.key().as_str() {
        "Escape" => {
            if let Route::Flow { pack, view } = ctx.address.get_untracked().route {
                let view = FlowView { text: view.text, live: view.live, ..FlowView::default() };
                ctx.replace(Route::Flow { pack, view });
            }
        }
        "ArrowLeft" | "ArrowRight" => {
            let map =
                document().get_element_by_id("flow-latent").and_then(|m| m.dyn_into::<HtmlElement>().ok());
            let Some(map) = map else { return false };
            let _ = map.focus();
        }
        _ => return false,
    }
    true
}
