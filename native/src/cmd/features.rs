//! `stratascope features`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use shared::Precision;
use shared::config::Count;

use crate::evaluate::EvalReport;
use crate::evaluate::layers::LayersReport;
use crate::features::select::Amounts;
use crate::features::{self, Names, Options, Source, texts};
use crate::flow::FlowOptions;
use crate::sae_files::SaeFile;
use crate::stop::StopFlag;
use crate::store::Store;
use crate::{model, sae_files};

/// Arguments of `features`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Encodes training vectors of the store and collects, for each latent, its density, largest and mean activation, a \
histogram, examples (largest, from each quarter of the range, random), the logits it raises and lowers, and its \
nearest latents; and runs the passages of --texts through the model for live encoding. The result is a pack: a \
folder of safetensors and JSON files, described in docs/pack.md.

Of a multi-layer autoencoder (train --layers), the pack shows the passages across the layers instead: the latents of every \
token at every layer with what they miss, what goes with each latent at the next layer over the tokens of the store (a \
correlation), what it says about the next token at each layer, and what changes behind it when it is removed. \
FOLDER#resid.14 makes an ordinary pack of one of its layers.

Example:
  stratascope features --sae runs/a --store store --model SmolLM2.gguf \\
      --texts configs/demo-texts.toml --eval runs/a/eval/eval.json --out packs/a")]
pub(crate) struct Args {
    /// The autoencoder: a folder or file of any format that can be read.
    #[arg(long, value_name = "PATH")]
    sae: PathBuf,
    /// The activation store made by `harvest`: a folder, or s3://bucket/prefix or gs://bucket/prefix.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The language model the store was harvested from.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Passages to bundle: TOML with a [[text]] table (id, title, source, text) for each.
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// The eval.json of this autoencoder (of a multi-layer one the layers.json), to quote in the pack.
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Folder of the pack; an older pack there is replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Training tokens to encode, in whole sequences.
    #[arg(long, value_name = "N", default_value = "300k")]
    tokens: Count,
    /// Examples with the largest activations.
    #[arg(long, value_name = "N", default_value_t = 12)]
    top: usize,
    /// Examples from each quarter of the activation range.
    #[arg(long, value_name = "N", default_value_t = 3)]
    per_quarter: usize,
    /// Examples drawn at random among all activations.
    #[arg(long, value_name = "N", default_value_t = 6)]
    random: usize,
    /// Tokens shown before the chosen one.
    #[arg(long, value_name = "N", default_value_t = 20)]
    before: usize,
    /// Tokens shown after it.
    #[arg(long, value_name = "N", default_value_t = 12)]
    after: usize,
    /// Latents in a feature file: what a page loads to show one of them.
    #[arg(long, value_name = "N", default_value_t = 8)]
    latents_per_shard: usize,
    /// Most tokens of a bundled passage.
    #[arg(long, value_name = "N", default_value_t = 128)]
    text_tokens: usize,
    /// The number format the language model runs in: f32, bf16 or q8_0 [default: as the store was harvested].
    #[arg(long, value_name = "FORMAT")]
    precision: Option<Precision>,
    /// Of a multi-layer autoencoder: most passages shown across the layers, the first ones.
    #[arg(long, value_name = "N", default_value_t = 6)]
    flow_texts: usize,
    /// Of a multi-layer autoencoder: latents described layer by layer, the most active of those passages.
    #[arg(long, value_name = "N", default_value_t = 512)]
    flow_latents: usize,
    /// Of a multi-layer autoencoder: latents removed in each of those passages, one at a time.
    #[arg(long, value_name = "N", default_value_t = 32)]
    flow_effects: usize,
    /// Seed of the random examples.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Short name of the pack; made from model, tap and width when not given.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Title of the pack.
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// Name of the text the store was harvested from.
    #[arg(long, value_name = "TEXT")]
    corpus: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let stop = StopFlag::from_signals()?;
    let passages = args.texts.as_deref().map(texts::read).transpose()?.unwrap_or_default();
    let file = read_sae(&args.sae).context("cannot read the autoencoder")?;
    // A multi-layer autoencoder is evaluated at all layers at once.
    let (one, layers) = match file.metadata.layers {
        Some(_) => (None, args.eval.as_deref()),
        None => (args.eval.as_deref(), None),
    };
    let eval = one.map(read_json::<EvalReport>).transpose()?;
    let layers_eval = layers.map(read_json::<LayersReport>).transpose()?;
    let store = Store::open(&args.store).context("cannot open the store")?;
    let precision = args.precision.unwrap_or(store.manifest().model.precision);
    let model = model::load_as(&args.model, precision).context("cannot load the language model")?;
    let source = Source {
        file: &file,
        store: &store,
        model: &model,
        passages: &passages,
        eval: eval.as_ref(),
        layers_eval: layers_eval.as_ref(),
    };
    let names = Names { name: args.name.clone(), title: args.title.clone(), corpus: args.corpus.clone() };
    features::collect(&source, &args.options(), &names, &args.out, &stop)?;
    tracing::info!("pack written to {}", args.out.display());
    Ok(())
}

impl Args {
    fn options(&self) -> Options {
        let &Self { top, per_quarter, random, before, after, .. } = self;
        Options {
            tokens: self.tokens.0,
            amounts: Amounts { top, per_quarter, random, before, after },
            latents_per_shard: self.latents_per_shard,
            text_tokens: self.text_tokens,
            seed: self.seed,
            flow: FlowOptions {
                texts: self.flow_texts,
                latents: self.flow_latents,
                effects: self.flow_effects,
            },
        }
    }
}

/// A multi-layer autoencoder as a whole, unless the path names one of its layers.
fn read_sae(path: &Path) -> Result<SaeFile> {
    let names_a_layer = !path.exists() && path.to_str().is_some_and(|path| path.contains('#'));
    if names_a_layer { sae_files::read(path) } else { sae_files::read_whole(path) }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let context = || format!("cannot read the evaluation {}", path.display());
    let bytes = std::fs::read(path).with_context(context)?;
    serde_json::from_slice(&bytes).with_context(context)
}
