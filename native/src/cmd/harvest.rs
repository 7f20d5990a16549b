//! `stratascope harvest`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use shared::config::harvest::HarvestConfig;
use shared::config::{self, Override};

use crate::harvest::{self, Inputs, Output};
use crate::model;
use crate::stop::StopFlag;
use crate::store::{Place, Store};

const EXAMPLES: &str = "\
Texts:
  FOLDER or FILE                          .txt, .jsonl, .json (each also .gz or .zst), .parquet, .arrow
  hf://datasets/org/name                  a data set of the Hugging Face hub, its main branch
  hf://datasets/org/name@v1.0/data        one folder of it, at a tag, branch or commit
  hf://datasets/org/name/data/train-*.parquet   the files a pattern describes (* ? **)
Files of the hub are fetched one after another, only as many as the tokens asked for need.

Models:
  FOLDER or FILE.gguf                     on this machine
  org/name, org/name@revision             of the hub; config, tokenizer and safetensors are fetched
  org/name:file.gguf                      one GGUF file of a repository
HF_TOKEN opens gated models, HF_HOME moves the cache, HF_ENDPOINT names a mirror, --offline forbids the network.

Examples:
  stratascope harvest --model google/gemma-2-2b --text hf://datasets/monology/pile-uncopyrighted \\
      --tap resid.12 --tokens 10M --dtype bf16 --out store
  stratascope harvest --model SmolLM2-135M.gguf --text books/ --tap resid --tokens 1M --out store
  stratascope harvest --config run.toml --set drop_tokens='[\"special\", \"whitespace\"]' --out store

docs/store.md lists every key, docs/data.md explains texts, the hub, splits and the token cache.";

/// Arguments of `harvest`. Every flag but `--out`, `--work` and `--json` is also a key of the configuration.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Args {
    /// The folder to write the store into, or s3://bucket/prefix or gs://bucket/prefix; an unfinished store there is
    /// resumed. Credentials and endpoint are taken from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_SERVICE_ACCOUNT).
    #[arg(long, value_name = "DIR|URL")]
    out: PathBuf,
    /// With a URL for --out: the folder of this machine to work in. Holds what is needed to resume until the end.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The model: a Hugging Face folder, a .gguf file, or a model of the hub such as google/gemma-2-2b@main.
    #[arg(long, value_name = "PATH|ID")]
    model: Option<String>,
    /// The number format the model runs in: f32, bf16 or q8_0. The last two are faster and less exact.
    #[arg(long, value_name = "FORMAT")]
    precision: Option<String>,
    /// Text files and folders (.txt, .jsonl, .json, each also .gz or .zst, .parquet, .arrow), and data sets of the hub
    /// such as hf://datasets/org/name@main/data/*.parquet.
    #[arg(long, value_name = "PATH|URL", num_args = 1..)]
    text: Vec<String>,
    /// Where to read: resid.14, mlp.3, attn.0, a whole site (resid), or all. May be given several times.
    #[arg(long = "tap", value_name = "TAP", num_args = 1.., value_delimiter = ',')]
    taps: Vec<String>,
    /// Tokens to run through the model, held-out ones included (300k, 1M).
    #[arg(long, value_name = "N")]
    tokens: Option<String>,
    /// The part held out for evaluation, in whole documents: a share (0.05, 5%) or a number of tokens (15k).
    #[arg(long, value_name = "PART")]
    held_out: Option<String>,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N")]
    sequence_length: Option<u32>,
    /// Sequences in one forward pass.
    #[arg(long, value_name = "N")]
    batch: Option<u32>,
    /// The number type of stored vectors: f32, bf16 or f16.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<String>,
    /// The seed of every random choice.
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
    /// Join hard-wrapped lines.
    #[arg(long)]
    unwrap_lines: bool,
    /// Where tokenised text is kept for the next harvest of it: a folder, auto (the user's cache) or none.
    #[arg(long, value_name = "DIR|auto|none")]
    token_cache: Option<String>,
    /// A TOML file with these and further keys; flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any key of the configuration; wins over everything.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn resolve(&self) -> Result<HarvestConfig> {
        let text = match &self.config {
            Some(path) => fs::read_to_string(path)
                .with_context(|| format!("cannot read configuration {}", path.display()))?,
            None => String::new(),
        };
        let mut overrides = Vec::new();
        for (key, value) in [
            ("model", &self.model),
            ("precision", &self.precision),
            ("tokens", &self.tokens),
            ("held_out", &self.held_out),
            ("dtype", &self.dtype),
            ("token_cache", &self.token_cache),
        ] {
            overrides.extend(value.as_ref().map(|value| Override::new(key, value.as_str())));
        }
        for (key, values) in [("text", &self.text), ("taps", &self.taps)] {
            if !values.is_empty() {
                overrides.push(Override::new(key, values.clone()));
            }
        }
        for (key, value) in
            [("sequence_length", self.sequence_length), ("batch", self.batch), ("seed", self.seed)]
        {
            overrides.extend(value.map(|value| Override::new(key, value)));
        }
        if self.unwrap_lines {
            overrides.push(Override::new("unwrap_lines", true));
        }
        for text in &self.overrides {
            overrides.push(Override::parse(text)?);
        }
        let mut resolved: HarvestConfig = config::resolve(&text, &overrides).with_context(|| {
            self.config.as_ref().map_or("harvest settings".to_owned(), |p| p.display().to_string())
        })?;
        resolved.validate()?;
        resolved.token_cache.get_or_insert_with(|| "auto".to_owned());
        Ok(resolved)
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = args.resolve()?;
    let out = Output::at(Place::of(&args.out)?, args.work.as_deref())?;
    if let Some(store) = harvest::finished(&config, out.clone())? {
        tracing::info!("{} is already finished with these settings", args.out.display());
        return show(args, &store);
    }
    let stop = StopFlag::from_signals()?;
    let loaded = model::load_as(config.model.as_ref(), config.precision)?;
    let summary = harvest::run(&config, out, &Inputs::of(&loaded, &config)?, &stop)?;
    if args.json {
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&summary)?)?;
    } else {
        writeln!(io::stdout(), "{summary}")?;
    }
    Ok(())
}

fn show(args: &Args, store: &Store) -> Result<()> {
    if args.json {
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(store.manifest())?)?;
    } else {
        write!(io::stdout(), "{}", store.describe())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use shared::config::{Count, Portion};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn resolve(flags: &[&str]) -> Result<HarvestConfig> {
        Command::parse_from(["x", "--out", "o"].iter().chain(flags)).args.resolve()
    }

    #[test]
    fn set_wins_over_flags_and_flags_win_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        fs::write(&file, "model = \"m\"\ntext = [\"t\"]\nseed = 1\nbatch = 2\ntokens = \"7k\"\n").unwrap();
        let file = file.to_str().unwrap();
        let flags =
            ["--config", file, "--tap", "resid.1,mlp.2", "--tap", "attn", "--seed", "5", "--batch", "6"];
        let config = resolve(&[&flags[..], &["--held-out", "15%", "--set", "batch=9"]].concat()).unwrap();
        assert_eq!((config.seed, config.batch, config.tokens), (5, 9, Count(7000)));
        assert_eq!(
            (config.held_out, config.taps.join(" ")),
            (Portion::Share(0.15), "resid.1 mlp.2 attn".to_owned())
        );
        assert_eq!(config.text, ["t"]);
    }

    #[test]
    fn faults_name_the_key() {
        let given = ["--model", "m", "--text", "t", "--tap", "resid.1"];
        resolve(&given).unwrap();
        for (flags, word) in [
            (["--tokens", "many"], "tokens"),
            (["--set", "batch=0"], "`batch`"),
            (["--set", "btach=3"], "btach"),
            (["--dtype", "f8"], "dtype"),
            (["--precision", "f8"], "precision"),
        ] {
            let error = format!("{:#}", resolve(&[&given[..], &flags[..]].concat()).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        assert!(resolve(&given[2..]).unwrap_err().to_string().contains("`model`"));
    }
}
