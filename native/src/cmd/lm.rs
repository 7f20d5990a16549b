//! `stratascope lm`: the language model by itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use shared::lm::{LmError, NoTap, Tap, TapAction, TokenBatch, Until, nll};
use shared::tap::TapPoint;
use shared::{Precision, Rows};

use crate::{files, model, progress};

mod steer;

/// Arguments of `lm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write every activation of given token sequences, for comparing with another program.
    ///
    /// Reads `input_ids` [batch, seq] (int64, int32 or uint32) and writes, in f32: `embed.0`, and for every layer L
    /// `resid.L` (residual stream after the MLP was added), `mlp.L` (what the MLP adds to it), `attn.L`
    /// (concatenated heads before the output projection) and `mlp_in.L` (the residual stream normalised for the MLP,
    /// without the norm's gain and bias), each [batch, seq, width]; `logits` [batch, seq, vocab];
    /// `nll` [batch, seq-1], −log p of each next token. No token is added: put the BOS token into `input_ids` if the
    /// model wants one.
    #[command(
        after_help = "Example:\n  stratascope lm taps --model gemma-2-2b/ --tokens ids.safetensors --out taps.safetensors"
    )]
    Taps(TapsArgs),
    /// Mean next-token loss of a text, in nats per token.
    ///
    /// The text is cut into sequences; the first token of each is read but not predicted. The BOS token is put in
    /// front of each sequence when the model wants one. With --steer the loss of the steered model is printed too.
    #[command(
        after_help = "Examples:\n  stratascope lm score --model SmolLM2-135M.gguf --text moby.txt --tokens 256\n  \
                      stratascope lm score --model SmolLM2-135M.gguf --text moby.txt --tokens 256 \\\n    \
                      --steer run/sae --latent 42 --alpha 20"
    )]
    Score(ScoreArgs),
}

#[derive(Debug, clap::Args)]
struct TapsArgs {
    /// A Hugging Face folder (config.json, safetensors) or a .gguf file.
    #[arg(long, value_name = "DIR|GGUF")]
    model: PathBuf,
    /// The number format the model runs in: f32, bf16 or q8_0.
    #[arg(long, value_name = "FORMAT", default_value_t = Precision::F32)]
    precision: Precision,
    /// A safetensors file with `input_ids` [batch, seq].
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ScoreArgs {
    /// A Hugging Face folder with its tokenizer, or a .gguf file.
    #[arg(long, value_name = "DIR|GGUF")]
    model: PathBuf,
    /// The number format the model runs in: f32, bf16 or q8_0.
    #[arg(long, value_name = "FORMAT", default_value_t = Precision::F32)]
    precision: Precision,
    /// A UTF-8 text file.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=65536))]
    seq: u32,
    /// Use only the first so many tokens of the text.
    #[arg(long)]
    tokens: Option<usize>,
    /// Print JSON: {"mean_nll", "predicted_tokens", "tokens_per_second"}, and "steered_mean_nll" with --steer.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    steering: steer::SteerArgs,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Taps(args) => taps(args),
        Command::Score(args) => score(args),
    }
}

/// Keeps a copy of everything it is shown.
struct KeepAll {
    kept: Vec<(TapPoint, usize, Vec<f32>)>,
}

impl Tap for KeepAll {
    fn wants(&self, _point: TapPoint) -> bool {
        true
    }

    fn visit(&mut self, point: TapPoint, value: Rows<'_>) -> Result<TapAction, LmError> {
        self.kept.push((point, value.width(), value.data().to_vec()));
        Ok(TapAction::Keep)
    }
}

fn taps(args: &TapsArgs) -> Result<()> {
    let (ids, seq) = read_ids(&args.tokens)?;
    let (model, _) = model::load_weights_as(&args.model, args.precision)?;
    let tokens = TokenBatch::new(&ids, seq)?;
    let mut tap = KeepAll { kept: Vec::new() };
    let logits = model
        .forward(tokens, &mut tap, Until::Logits)
        .with_context(|| format!("cannot run the model on {}", args.tokens.display()))?;
    let logits = logits.context("the model returned no logits")?;
    let (batch, vocab) = (tokens.batch(), model.spec().vocab_size);
    let losses = nll(&logits, vocab, tokens);
    let mut tensors: Vec<(String, Vec<usize>, &[f32])> = tap
        .kept
        .iter()
        .map(|(point, width, values)| (point.to_string(), vec![batch, seq, *width], values.as_slice()))
        .collect();
    tensors.push(("logits".to_owned(), vec![batch, seq, vocab], &logits));
    tensors.push(("nll".to_owned(), vec![batch, seq - 1], &losses));
    write_f32(&args.out, tensors)?;
    tracing::info!("{} taps of {batch} × {seq} tokens written to {}", tap.kept.len(), args.out.display());
    Ok(())
}

fn write_f32(path: &Path, tensors: Vec<(String, Vec<usize>, &[f32])>) -> Result<()> {
    let views = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            Ok((name, TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(values))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, None)?;
    files::write_bytes(path, &bytes)
}

/// `input_ids` and the sequence length.
fn read_ids(path: &Path) -> Result<(Vec<u32>, usize)> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let read = || format!("{} is not a usable safetensors file", path.display());
    let file = SafeTensors::deserialize(&bytes).with_context(read)?;
    let found = || file.names().into_iter().map(str::to_owned).collect::<Vec<_>>().join(", ");
    let tensor = file
        .tensor("input_ids")
        .with_context(|| format!("{}: expected a tensor input_ids, found: {}", path.display(), found()))?;
    let &[batch, seq] = tensor.shape() else {
        bail!("{}: input_ids has shape {:?}, expected [batch, seq]", path.display(), tensor.shape());
    };
    ensure!(batch > 0 && seq > 0, "{}: input_ids is empty (shape [{batch}, {seq}])", path.display());
    let data = tensor.data();
    let wide: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        Dtype::I32 => data.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        Dtype::U32 => data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b).into()).collect(),
        other => bail!("{}: input_ids is {other:?}, expected I64, I32 or U32", path.display()),
    };
    let ids = wide.iter().enumerate().map(|(i, &id)| {
        u32::try_from(id).with_context(|| {
            format!("{}: input_ids[{}, {}] is {id}, which is no token id", path.display(), i / seq, i % seq)
        })
    });
    Ok((ids.collect::<Result<_>>()?, seq))
}

fn score(args: &ScoreArgs) -> Result<()> {
    let text =
        fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let loaded = model::load_as(&args.model, args.precision)?;
    let mut ids = loaded.tokenizer.encode(&text)?;
    ids.truncate(args.tokens.unwrap_or(usize::MAX));
    ensure!(ids.len() > 1, "{} has {} token(s); at least 2 are needed", args.text.display(), ids.len());
    let steering = args.steering.read(&loaded.model)?;
    let bos = loaded.tokenizer.bos().filter(|_| loaded.tokenizer.prepend_bos());
    let bar = progress::bar(ids.len() as u64, "score", "tokens");
    let started = std::time::Instant::now();
    let (mut total, mut steered, mut predicted, mut run) = (0f64, 0f64, 0usize, 0usize);
    let sum = |losses: &[f32]| losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    for sequences in ids.chunks(args.seq as usize * 8) {
        // Whole sequences go through together, the rest of the text by itself.
        let whole = sequences.len() / args.seq as usize * args.seq as usize;
        let (whole, rest) = sequences.split_at(whole);
        for (piece, seq) in [(whole, args.seq as usize), (rest, rest.len())] {
            if piece.is_empty() {
                continue;
            }
            let with_bos: Vec<u32> =
                piece.chunks(seq).flat_map(|s| bos.into_iter().chain(s.iter().copied())).collect();
            let batch = TokenBatch::new(&with_bos, seq + usize::from(bos.is_some()))?;
            let losses = loaded.model.forward_nll(batch, &mut NoTap)?;
            total += sum(&losses);
            if let Some(steering) = &steering {
                let mut tap = steering.tap(batch, &loaded.tokenizer);
                steered += sum(&loaded.model.forward_nll(batch, &mut tap)?);
            }
            predicted += losses.len();
            run += batch.n_tokens();
        }
        bar.inc(sequences.len() as u64);
    }
    bar.finish_and_clear();
    ensure!(predicted > 0, "no token was predicted");
    let (mean, rate) = (total / predicted as f64, run as f64 / started.elapsed().as_secs_f64());
    let steered = steering.map(|steering| (steering.describe(), steered / predicted as f64));
    if args.json {
        let mut json =
            serde_json::json!({"mean_nll": mean, "predicted_tokens": predicted, "tokens_per_second": rate});
        if let Some((_, steered)) = steered {
            json["steered_mean_nll"] = steered.into();
        }
        println!("{json}");
    } else {
        println!("mean next-token loss {mean:.5} nats over {predicted} tokens ({rate:.0} tokens/s)");
        if let Some((what, steered)) = steered {
            println!("steered              {steered:.5} nats ({:+.5}): {what}", steered - mean);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(case: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lm").join(case)
    }

    fn run_taps(tokens: PathBuf, out: &Path) -> Result<()> {
        taps(&TapsArgs { model: golden("llama"), precision: Precision::F32, tokens, out: out.to_owned() })
    }

    fn write_ids(path: &Path, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        let view = TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        fs::write(path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
    }

    #[test]
    fn taps_writes_every_tensor_of_the_golden_with_its_shape() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.safetensors");
        run_taps(golden("llama").join("expected.safetensors"), &out).unwrap();
        let (found, wanted) =
            (fs::read(&out).unwrap(), fs::read(golden("llama").join("expected.safetensors")).unwrap());
        let (found, wanted) =
            (SafeTensors::deserialize(&found).unwrap(), SafeTensors::deserialize(&wanted).unwrap());
        assert_eq!(found.len() + 1, wanted.len());
        for (name, tensor) in found.iter() {
            let expected = wanted.tensor(name).unwrap();
            assert_eq!((tensor.shape(), tensor.dtype()), (expected.shape(), Dtype::F32), "{name}");
            let floats = |bytes: &[u8]| -> Vec<f32> {
                bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            };
            for (a, b) in floats(tensor.data()).iter().zip(floats(expected.data())) {
                assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{name}: {a} for {b}");
            }
        }
    }

    #[test]
    fn ids_may_be_narrow_and_must_be_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let (ids, out) = (folder.path().join("ids.safetensors"), folder.path().join("out.safetensors"));
        let bytes = |ids: &[i32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
        for dtype in [Dtype::I32, Dtype::U32] {
            write_ids(&ids, "input_ids", dtype, &[2, 2], &bytes(&[1, 2, 3, 100]));
            run_taps(ids.clone(), &out).unwrap();
        }
        let refused = |what: &str| {
            let error = format!("{:#}", run_taps(ids.clone(), &out).unwrap_err());
            assert!(error.contains(what), "{error}");
        };
        write_ids(&ids, "input_ids", Dtype::I32, &[2, 2], &bytes(&[1, 2, 3, 101]));
        refused("token id 101 at position 3 is outside the vocabulary of 101");
        write_ids(&ids, "input_ids", Dtype::I32, &[2, 2], &bytes(&[1, -2, 3, 4]));
        refused("input_ids[0, 1] is -2");
        write_ids(&ids, "input_ids", Dtype::I32, &[4], &bytes(&[1, 2, 3, 4]));
        refused("expected [batch, seq]");
        write_ids(&ids, "input_ids", Dtype::F32, &[2, 2], &bytes(&[1, 2, 3, 4]));
        refused("expected I64, I32 or U32");
        write_ids(&ids, "input_ids", Dtype::I32, &[0, 2], &[]);
        refused("empty");
        write_ids(&ids, "ids", Dtype::I32, &[2, 2], &bytes(&[1, 2, 3, 4]));
        refused("expected a tensor input_ids, found: ids");
        fs::write(&ids, b"nonsense").unwrap();
        refused("not a usable safetensors file");
    }
}
