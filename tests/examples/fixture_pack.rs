//! Writes a small synthetic pack for pages and readers under test.
//!
//! `cargo run -p conformance --example fixture_pack -- DIR` makes `DIR/pack.json` and the rest of a pack, `--layers DIR` that of a
//! multi-layer autoencoder; with `--site DIR` it makes `DIR/packs/index.json` and `DIR/packs/…` of both, the data of a site.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};
use shared::pack::{self, Catalogue, Manifest, PackEntry};

type Files = BTreeMap<String, Vec<u8>>;

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let one = conformance::fixture_pack::files;
    let layers = conformance::fixture_flow::files;
    match &arguments[..] {
        [folder] => write_all(&one()?, folder),
        [option, folder] if option == Path::new("--layers") => write_all(&layers()?, folder),
        [option, folder] if option == Path::new("--site") => {
            let mut entries = Vec::new();
            for files in [one()?, layers()?] {
                let manifest = files.get(pack::MANIFEST).context("the fixture has no manifest")?;
                let entry = PackEntry::of(&Manifest::read(manifest)?);
                write_all(&files, &folder.join("packs").join(&entry.path))?;
                entries.push(entry);
            }
            write(&folder.join(pack::CATALOGUE), &Catalogue::new(entries).write()?)
        }
        _ => anyhow::bail!("usage: fixture_pack [--layers | --site] DIR"),
    }
}

fn write_all(files: &Files, root: &Path) -> Result<()> {
    for (path, bytes) in files {
        write(&root.join(path), bytes)?;
    }
    println!("{} files in {}", files.len(), root.display());
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().context("a file needs a folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
