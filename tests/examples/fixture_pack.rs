//! Writes a small synthetic pack for pages and readers under test.
//!
//! `cargo run -p conformance --example fixture_pack -- DIR` makes `DIR/pack.json` and the rest of a pack;
//! with `--site DIR` it makes `DIR/packs/index.json` and `DIR/packs/fixture/…`, the data of a site.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};
use shared::pack::{self, Catalogue, Manifest, PackEntry};

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let files = conformance::fixture_pack::files()?;
    let manifest = Manifest::read(files.get(pack::MANIFEST).context("the fixture has no manifest")?)?;
    let root = match &arguments[..] {
        [folder] => folder.clone(),
        [option, folder] if option == Path::new("--site") => {
            let entry = PackEntry::of(&manifest);
            let root = folder.join("packs").join(&entry.path);
            write(&folder.join(pack::CATALOGUE), &Catalogue::new(vec![entry]).write()?)?;
            root
        }
        _ => anyhow::bail!("usage: fixture_pack [--site] DIR"),
    };
    for (path, bytes) in &files {
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
