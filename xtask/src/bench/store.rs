//! Reading a store beside reading the same bytes plainly.

use anyhow::{Context, Result};

use crate::places::Places;
use crate::run::Program;

/// Runs the bench: it lives beside the library it measures, and prints its own lines.
pub(crate) fn run(places: &Places) -> Result<()> {
    let folder = places.target.join("bench").join("store");
    Program::cargo()
        .args(["run", "--release", "--package", "native", "--example", "bench_store", "--"])
        .arg(&folder)
        .current_dir(&places.root)
        .run()
        .context("the bench of the store failed")
}
