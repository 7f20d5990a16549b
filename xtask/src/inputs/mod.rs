//! The demo's model and text: a local path if given, else fetched once into the cache and checked.

mod hub;
mod model;
mod text;

use std::path::{Path, PathBuf};

use anyhow::Result;

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
