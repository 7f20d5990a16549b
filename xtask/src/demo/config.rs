//! A configuration of several stages holds one table a stage; the commands read one file each. This file cuts the one into
//! the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// One configuration file a stage, written to a folder.
#[derive(Debug)]
pub(crate) struct Configs {
    source: PathBuf,
    tables: BTreeMap<String, (PathBuf, toml::Table, String)>,
}

/// Reads `source` and writes each of its tables, which are those of `stages`, as `folder/STAGE.toml`.
pub(crate) fn split(source: &Path, stages: &[&str], folder: &Path) -> Result<Configs> {
    let text = fs::read_to_string(source).with_context(|| format!("cannot read {}", source.display()))?;
    let whole: toml::Table =
        text.parse().with_context(|| format!("{} is not valid TOML", source.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut tables = BTreeMap::new();
    for (name, value) in whole {
        let (true, toml::Value::Table(table)) = (stages.contains(&name.as_str()), value) else {
            bail!("{}: `{name}` is not one of the tables {}", source.display(), stages.join(", "));
        };
        let text = toml::to_string(&table).context("cannot write TOML")?;
        let path = folder.join(format!("{name}.toml"));
        fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        tables.insert(name, (path, table, text));
    }
    Ok(Configs { source: source.to_owned(), tables })
}

impl Configs {
    /// The table of a stage.
    pub(crate) fn values(&self, stage: &str) -> Result<&toml::Table> {
        self.table(stage).map(|(_, table, _)| table)
    }

    fn table(&self, stage: &str) -> Result<&(PathBuf, toml::Table, String)> {
        self.tables.get(stage).with_context(|| format!("{} has no table [{stage}]", self.source.display()))
    }

    /// The file of a stage.
    pub(crate) fn path(&self, stage: &str) -> Result<&Path> {
        self.table(stage).map(|(path, ..)| path.as_path())
    }

    /// The text of a stage's file: what it depends on.
    pub(crate) fn text(&self, stage: &str) -> Result<&str> {
        self.table(stage).map(|(.., text)| text.as_str())
    }

    /// A stage's table as command-line options, for commands that take no file: `name = 3` becomes `--name 3`.
    pub(crate) fn arguments(&self, stage: &str) -> Result<Vec<String>> {
        let mut arguments = Vec::new();
        for (key, value) in &self.table(stage)?.1 {
            let option = format!("--{}", key.replace('_', "-"));
            match value {
                toml::Value::Boolean(true) => arguments.push(option),
                toml::Value::Boolean(false) => {}
                toml::Value::String(text) => arguments.extend([option, text.clone()]),
                toml::Value::Integer(_) | toml::Value::Float(_) => {
                    arguments.extend([option, value.to_string()]);
                }
                _ => bail!("{}: {stage}.{key} must be a word, a number or true", self.source.display()),
            }
        }
        Ok(arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_text(text: &str) -> Result<Configs> {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("demo.toml");
        fs::write(&source, text).unwrap();
        split(&source, &["harvest", "train", "eval"], &folder.path().join("out"))
    }

    #[test]
    fn tables_become_files_and_options() {
        let configs = split_text(
            "[train]\nwidth = 4096\n[eval]\nsequences = 64\ntop_k = 1.5\nquiet = true\nloud = false\n",
        )
        .unwrap();
        assert_eq!(configs.text("train").unwrap(), "width = 4096\n");
        assert_eq!(configs.arguments("eval").unwrap(), ["--quiet", "--sequences", "64", "--top-k", "1.5"]);
        assert!(configs.path("harvest").unwrap_err().to_string().contains("no table [harvest]"));
    }

    #[test]
    fn an_unknown_table_is_refused() {
        assert!(
            split_text("[trian]\nwidth = 1\n").unwrap_err().to_string().contains("`trian` is not one of")
        );
        assert!(split_text("width = 1\n").is_err());
    }
}
