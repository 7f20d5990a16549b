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

/// Arguments of `harvest`. Every flag but `--out`, `--work` and `--json` is also a key of the configuration.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder to write the store into, or s3://bucket/prefix or gs://bucket/prefix; an unfinished store there is
    /// resumed. Credentials and endpoint are taken from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_SERVICE_ACCOUNT).
    #[arg(long, value_name = "DIR|URL")]
    out: PathBuf,
    /// With a URL for --out: the folder of this machine to work in. Holds what is needed to resume until the end.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The model: a Hugging Face folder or a .gguf file.
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Text files and folders: .txt, .jsonl (each also .gz or .zst), .parquet.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    text: Vec<String>,
    /// Where to read: resid.14, mlp.3, attn.0, a whole site (resid), or all. May be given several times.
    #[arg(long = "tap", value_name = "TAP", num_args = 1.., value_delimiter = ',')]
    taps: Vec<String>,
    /// Tokens to run through the model, held-out ones included (300k, 1M).
    #[arg(long, value_name = "N")]
    tokens: Option<String>,
    /// The part held out for evaluation: a share (0.05, 5%) or a number of tokens (15k).
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
            ("tokens", &self.tokens),
            ("held_out", &self.held_out),
            ("dtype", &self.dtype),
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
        let resolved: HarvestConfig = config::resolve(&text, &overrides).with_context(|| {
            self.config.as_ref().map_or("harvest settings".to_owned(), |p| p.display().to_string())
        })?;
        resolved.validate()?;
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
    let loaded = model::load(config.model.as_ref())?;
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
        ] {
            let error = format!("{:#}", resolve(&[&given[..], &flags[..]].concat()).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        assert!(resolve(&given[2..]).unwrap_err().to_string().contains("`model`"));
    }
}
