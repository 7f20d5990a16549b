//! The demo's model and text: a local path if given, else fetched once into the cache and checked.

mod hub;
mod model;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::lock::Lock;
use crate::places::Places;
use crate::report::Report;

pub(crate) use model::Source;

/// Something to read, and one string that changes when it does.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Name, version and checksum, or what stands for them in a local file.
    pub(crate) identity: String,
}

/// Fails early when a path given for model or text is not there: before minutes of set-up.
pub(crate) fn check(model: &Source, text: Option<&Path>) -> Result<()> {
    if let Source::Local(path) = model
        && !path.exists()
    {
        bail!(
            "there is no model at {}, so name a Hugging Face folder or a .gguf file with --model",
            path.display()
        );
    }
    match text {
        Some(path) if !path.exists() => {
            bail!("there is no text at {}, so name a file or a folder with --text", path.display());
        }
        _ => Ok(()),
    }
}

/// Makes sure of model and text, in this order.
pub(crate) fn ensure(
    places: &Places,
    report: &mut Report,
    model: &Source,
    text: Option<&Path>,
) -> Result<(Input, Input)> {
    report.heading("Model and text");
    let _lock = Lock::take(&places.cache)?;
    Ok((model::ensure(places, report, model)?, text::ensure(places, report, text)?))
}
