//! Fetching pack files: each once, checked against the manifest's size and hash, every failure with a reason.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use shared::pack::flow::{
    self, FlowEntry, FlowInfo, FlowLatents, FlowText, FlowThresholds, FlowVectors, LensShard,
};
use shared::pack::{self, Catalogue, Encoder, FeatureShard, Index, Manifest, PackEntry, Text, TextEntry};
use wasm_bindgen::{JsCast, JsValue};
use wasm_bindgen_futures::JsFuture;

use crate::state::load::Failure;

thread_local! {
    /// What was read, by path. Feature shards are small and a visit sees few of them: nothing is evicted.
    static CACHE: RefCell<HashMap<String, Arc<dyn Any + Send + Sync>>> = RefCell::default();
}

/// A pack of this site: where it lies and its manifest.
#[derive(Debug)]
pub(crate) struct Pack {
    /// Its entry in the catalogue.
    pub(crate) entry: PackEntry,
    /// Its manifest.
    pub(crate) manifest: Manifest,
}

/// The packs of this site.
pub(crate) async fn catalogue() -> Result<Arc<Catalogue>, Failure> {
    let path = pack::CATALOGUE;
    cached(path, async {
        let bytes = fetch(path).await?;
        Catalogue::read(&bytes).map_err(|e| Failure::content(path, e))
    })
    .await
}

/// The pack called `name`.
pub(crate) async fn pack(name: &str) -> Result<Arc<Pack>, Failure> {
    let catalogue = catalogue().await?;
    let Some(entry) = catalogue.packs.iter().find(|p| p.name == name) else {
        let names: Vec<&str> = catalogue.packs.iter().map(|p| p.name.as_str()).collect();
        return Err(Failure::absent(
            format!("Looking for the pack {name}"),
            format!("this site has {}", names.join(", ")),
        ));
    };
    let path = format!("packs/{}/{}", entry.path, pack::MANIFEST);
    cached(&path, async {
        let bytes = fetch(&path).await?;
        let manifest = Manifest::read(&bytes).map_err(|e| Failure::content(&path, e))?;
        Ok(Pack { entry: entry.clone(), manifest })
    })
    .await
}

/// One row a latent.
pub(crate) async fn index(pack: &Pack) -> Result<Arc<Index>, Failure> {
    let key = path(pack, "index");
    cached(&key, async {
        let numbers = file(pack, pack::INDEX_NUMBERS).await?;
        let words = file(pack, pack::INDEX_WORDS_FILE).await?;
        Index::read(pack.manifest.sae.n_latents, &numbers, &words).map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// The features of the shard that holds `latent`, and the latent's place in it.
pub(crate) async fn shard(pack: &Pack, latent: u32) -> Result<(Arc<FeatureShard>, usize), Failure> {
    let n_latents = pack.manifest.sae.n_latents;
    if latent as usize >= n_latents {
        let reason = format!("the pack has latents 0 to {}", n_latents - 1);
        return Err(Failure::absent(format!("Looking for latent {latent}"), reason));
    }
    let (shard, place) = pack.manifest.locate(latent as usize);
    let n = pack.manifest.shard_range(shard).len();
    let key = path(pack, &format!("features/{shard:05}"));
    let read = cached(&key, async {
        let numbers = file(pack, &pack::shard_numbers(shard)).await?;
        let words = file(pack, &pack::shard_words(shard)).await?;
        FeatureShard::read(shard, n, n_latents, &numbers, &words).map_err(|e| Failure::content(&key, e))
    })
    .await?;
    Ok((read, place))
}

/// The bundled texts.
pub(crate) async fn texts(pack: &Pack) -> Result<Arc<Vec<TextEntry>>, Failure> {
    let key = path(pack, pack::TEXTS);
    cached(&key, async {
        let bytes = file(pack, pack::TEXTS).await?;
        TextEntry::read_list(&bytes).map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// The activation vectors of one text.
pub(crate) async fn text(pack: &Pack, entry: &TextEntry) -> Result<Arc<Text>, Failure> {
    let key = path(pack, &entry.file);
    cached(&key, async {
        let bytes = file(pack, &entry.file).await?;
        Text::read(entry, pack.manifest.sae.d_in, &bytes).map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// What the manifest says about the layers of a multi-layer autoencoder.
pub(crate) fn flow_info(pack: &Pack) -> Result<&FlowInfo, Failure> {
    let reason = || Failure::absent("Looking across layers", "this pack is of one layer");
    pack.manifest.flow.as_ref().ok_or_else(reason)
}

/// The texts across layers.
pub(crate) async fn flow_texts(pack: &Pack) -> Result<Arc<Vec<FlowEntry>>, Failure> {
    flow_info(pack)?;
    let key = path(pack, flow::FLOW);
    cached(&key, async {
        let bytes = file(pack, flow::FLOW).await?;
        FlowEntry::read_list(&bytes).map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// The codes of a text at every layer.
pub(crate) async fn flow_text(pack: &Pack, entry: &FlowEntry) -> Result<Arc<FlowText>, Failure> {
    let (n_layers, key) = (flow_info(pack)?.layers.len(), path(pack, &entry.file));
    cached(&key, async {
        let bytes = file(pack, &entry.file).await?;
        FlowText::read(entry, n_layers, pack.manifest.sae.n_latents, &bytes)
            .map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// The vectors of a text at every layer; not cached here: megabytes that are used once.
pub(crate) async fn flow_vectors(pack: &Pack, entry: &FlowEntry) -> Result<FlowVectors, Failure> {
    let bytes = file(pack, &entry.vectors).await?;
    FlowVectors::read(entry, flow_info(pack)?.layers.len(), pack.manifest.sae.d_in, &bytes)
        .map_err(|e| Failure::content(&path(pack, &entry.vectors), e))
}

/// The thresholds of layers, where they have their own.
pub(crate) async fn flow_thresholds(pack: &Pack) -> Result<Option<FlowThresholds>, Failure> {
    let info = flow_info(pack)?;
    if !info.thresholds_per_layer {
        return Ok(None);
    }
    let bytes = file(pack, flow::FLOW_THRESHOLDS).await?;
    let read = FlowThresholds::read(info, pack.manifest.sae.n_latents, &bytes);
    read.map(Some).map_err(|e| Failure::content(&path(pack, flow::FLOW_THRESHOLDS), e))
}

/// The described latents.
pub(crate) async fn flow_latents(pack: &Pack) -> Result<Arc<FlowLatents>, Failure> {
    let (info, key) = (flow_info(pack)?, path(pack, flow::FLOW_LATENTS));
    cached(&key, async {
        let bytes = file(pack, flow::FLOW_LATENTS).await?;
        FlowLatents::read(info, pack.manifest.sae.n_latents, &bytes).map_err(|e| Failure::content(&key, e))
    })
    .await
}

/// The shard of the lens that holds the described latent at place `place`, and its place in it.
pub(crate) async fn lens(pack: &Pack, place: usize) -> Result<(Arc<LensShard>, usize), Failure> {
    let info = flow_info(pack)?;
    let (shard, within) = (place / info.latents_per_lens, place % info.latents_per_lens);
    let key = path(pack, &format!("flow/lens/{shard:05}"));
    let read = cached(&key, async {
        let numbers = file(pack, &flow::lens_numbers(shard)).await?;
        let words = file(pack, &flow::lens_words(shard)).await?;
        LensShard::read(shard, info.lens_range(shard).len(), info.layers.len(), &numbers, &words)
            .map_err(|e| Failure::content(&key, e))
    })
    .await?;
    Ok((read, within))
}

/// The encoder; not cached here, because whoever asks keeps it.
pub(crate) async fn encoder(pack: &Pack) -> Result<Encoder, Failure> {
    let bytes = file(pack, pack::ENCODER).await?;
    Encoder::read(&pack.manifest.sae, &bytes).map_err(|e| Failure::content(&path(pack, pack::ENCODER), e))
}

fn path(pack: &Pack, file: &str) -> String {
    format!("packs/{}/{file}", pack.entry.path)
}

/// A file of a pack, checked against the manifest. Its hash is part of the address, so that a cache
/// never mixes two versions of a site.
async fn file(pack: &Pack, name: &str) -> Result<Vec<u8>, Failure> {
    let path = path(pack, name);
    let Some(entry) = pack.manifest.files.get(name) else {
        return Err(Failure::content(&path, "the manifest does not list it"));
    };
    let version = entry.sha256.get(..12).unwrap_or_default();
    let bytes = fetch(&format!("{path}?v={version}")).await?;
    entry.verify(name, &bytes).map_err(|e| Failure::content(&path, e))?;
    Ok(bytes)
}

/// `make`'s value, made at most once for each `key`; failures are not kept, so that a retry is possible.
async fn cached<T: Send + Sync + 'static>(
    key: &str,
    make: impl Future<Output = Result<T, Failure>>,
) -> Result<Arc<T>, Failure> {
    let found = CACHE.with_borrow(|cache| cache.get(key).cloned());
    if let Some(found) = found.and_then(|any| any.downcast().ok()) {
        return Ok(found);
    }
    let made = Arc::new(make.await?);
    CACHE.with_borrow_mut(|cache| cache.insert(key.to_owned(), made.clone()));
    Ok(made)
}

/// The bytes at `path`, relative to the page.
async fn fetch(path: &str) -> Result<Vec<u8>, Failure> {
    let say = |e: &JsValue| {
        e.dyn_ref::<js_sys::Error>().map_or_else(|| format!("{e:?}"), |e| String::from(e.message()))
    };
    let window = web_sys::window().ok_or_else(|| Failure::fetch(path, "there is no window"))?;
    let response = JsFuture::from(window.fetch_with_str(path)).await;
    let response = response.map_err(|e| Failure::fetch(path, say(&e)))?;
    let response: web_sys::Response =
        response.dyn_into().map_err(|_| Failure::fetch(path, "the answer is not a response"))?;
    if !response.ok() {
        let status = format!("HTTP status {} {}", response.status(), response.status_text());
        return Err(Failure::fetch(path, status.trim()));
    }
    let buffer = response.array_buffer().map_err(|e| Failure::fetch(path, say(&e)))?;
    let buffer = JsFuture::from(buffer).await.map_err(|e| Failure::fetch(path, say(&e)))?;
    Ok(js_sys::Uint8Array::new(&buffer).to_vec())
}
