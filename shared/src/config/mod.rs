//! Run configurations: strict TOML, overridden key by key, resolved into one typed value.
//!
//! A configuration is a `serde` struct with `#[serde(default, deny_unknown_fields)]`. [`resolve`] lays a
//! TOML text and then overrides (flags, `--set key=value`) over its defaults; every error names the key.

pub mod harvest;
pub mod quantity;
pub mod train;

pub use quantity::{Count, Portion};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is not TOML, or a key in it is unknown or of the wrong type; the parser's message names the key.
    #[error("{0}")]
    Toml(String),
    /// An override that is not `key=value`.
    #[error("`{0}` is not an override: expected key=value, as in seed=1 or optimiser.lr=1e-3")]
    NotAnOverride(String),
    /// An override reaches into something that is not a table.
    #[error("override `{key}`: `{part}` is a single value, not a table of keys")]
    NotATable {
        /// The whole dotted key.
        key: String,
        /// The part of it that is not a table.
        part: String,
    },
    /// A value that parses but cannot be used.
    #[error("`{key}` is {found}, expected {expected}")]
    Value {
        /// The dotted key.
        key: &'static str,
        /// The value, printed.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
}

impl ConfigError {
    /// A value of `key` that cannot be used: what was found, what would have been accepted.
    #[expect(clippy::needless_pass_by_value, reason = "callers give numbers and texts made on the spot")]
    pub fn value(key: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::Value { key, found: found.to_string(), expected: expected.into() }
    }
}

/// One override: a dotted key and its value. Later overrides win over earlier ones and over the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    key: String,
    value: Value,
}

impl Override {
    /// Sets `key` (dots reach into tables) to `value`.
    pub fn new(key: impl Into<String>, value: impl Into<Value>) -> Self {
        Self { key: key.into(), value: value.into() }
    }

    /// Reads `key=value`. The value is TOML (`3`, `0.5`, `true`, `["a", "b"]`, `"text"`); what is not TOML is text.
    ///
    /// # Errors
    /// If there is no `=` or the key is empty.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let error = || ConfigError::NotAnOverride(text.to_owned());
        let (key, value) = text.split_once('=').ok_or_else(error)?;
        let (key, value) = (key.trim(), value.trim());
        if key.split('.').any(str::is_empty) {
            return Err(error());
        }
        let parsed = toml::from_str::<Table>(&format!("v = {value}")).ok();
        let parsed = parsed.filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
        Ok(Self { key: key.to_owned(), value: parsed.unwrap_or_else(|| Value::String(value.to_owned())) })
    }

    fn apply(&self, table: &mut Table) -> Result<(), ConfigError> {
        let (parents, leaf) = match self.key.rsplit_once('.') {
            Some((parents, leaf)) => (parents.split('.').collect(), leaf),
            None => (Vec::new(), self.key.as_str()),
        };
        let mut table = table;
        for part in parents {
            let entry = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
            table = entry
                .as_table_mut()
                .ok_or_else(|| ConfigError::NotATable { key: self.key.clone(), part: part.to_owned() })?;
        }
        table.insert(leaf.to_owned(), self.value.clone());
        Ok(())
    }
}

/// Reads `text` (TOML; empty for none), lays `overrides` over it in order, and types the result.
///
/// # Errors
/// Names the key and what is allowed, with line and column when the fault is in `text`.
pub fn resolve<T: DeserializeOwned>(text: &str, overrides: &[Override]) -> Result<T, ConfigError> {
    let toml_error = |e: toml::de::Error| ConfigError::Toml(e.to_string().trim_end().to_owned());
    // Typed once on its own, so that a fault of the file is reported with its line.
    toml::from_str::<T>(text).map_err(toml_error)?;
    let mut table: Table = toml::from_str(text).map_err(toml_error)?;
    for item in overrides {
        item.apply(&mut table)?;
        // And after every override, so that its own key is named.
        table
            .clone()
            .try_into::<T>()
            .map_err(|e| ConfigError::Toml(format!("{} = {}: {}", item.key, item.value, e.message())))?;
    }
    table.try_into().map_err(toml_error)
}

/// Splits a text that describes several runs: the tables of the array `list` each become a text of their own, with the keys
/// outside the array below theirs. A table's `name` names it. A text without the array is one nameless run.
///
/// # Errors
/// If the text is not TOML, `list` is no array of tables, or a name is missing, taken twice or not usable as a folder.
pub fn expand(text: &str, list: &'static str) -> Result<Vec<(Option<String>, String)>, ConfigError> {
    let mut common: Table =
        toml::from_str(text).map_err(|e| ConfigError::Toml(e.to_string().trim_end().to_owned()))?;
    let Some(entries) = common.remove(list) else { return Ok(vec![(None, text.to_owned())]) };
    let tables: Option<Vec<Table>> =
        entries.as_array().and_then(|all| all.iter().map(|entry| entry.as_table().cloned()).collect());
    let tables = tables
        .filter(|tables| !tables.is_empty())
        .ok_or_else(|| ConfigError::value(list, &entries, "tables, each begun with [[…]]"))?;
    let mut names = std::collections::BTreeSet::new();
    let mut texts = Vec::new();
    for mut table in tables {
        let name = match table.remove("name") {
            Some(Value::String(name)) => name,
            other => return Err(ConfigError::value(list, format!("{other:?}"), "a name in each")),
        };
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !plain || name.is_empty() || name.starts_with('.') {
            return Err(ConfigError::value(list, name, "names of letters, digits, `-`, `_` and `.`"));
        }
        if !names.insert(name.clone()) {
            return Err(ConfigError::value(list, name, "names that differ"));
        }
        let mut merged = common.clone();
        merged.extend(table);
        texts.push((Some(name), to_toml(&merged)?));
    }
    Ok(texts)
}

/// The resolved configuration as TOML text, for saving beside what it produced.
///
/// # Errors
/// If a value has no TOML form.
pub fn to_toml<T: serde::Serialize>(config: &T) -> Result<String, ConfigError> {
    toml::to_string(config).map_err(|e| ConfigError::Toml(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        seed: u64,
        name: String,
        optimiser: Optimiser,
    }

    impl Default for Sample {
        fn default() -> Self {
            Self { seed: 7, name: "a".to_owned(), optimiser: Optimiser::default() }
        }
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Optimiser {
        lr: f64,
    }

    fn set(texts: &[&str]) -> Vec<Override> {
        texts.iter().map(|t| Override::parse(t).unwrap()).collect()
    }

    #[test]
    fn overrides_win_over_the_file_and_defaults_fill_the_rest() {
        let overrides = set(&["optimiser.lr=1e-3", "name=b c", "optimiser.lr = 0.5"]);
        let sample: Sample = resolve("seed = 1\n[optimiser]\nlr = 2.0\n", &overrides).unwrap();
        assert_eq!(sample, Sample { seed: 1, name: "b c".to_owned(), optimiser: Optimiser { lr: 0.5 } });
        let sample: Sample = resolve("", &[]).unwrap();
        assert_eq!(sample.seed, 7);
    }

    #[test]
    fn errors_name_the_key() {
        let in_file = resolve::<Sample>("seed = 1\nsede = 2\n", &[]).unwrap_err().to_string();
        assert!(
            in_file.contains("line 2") && in_file.contains("sede") && in_file.contains("optimiser"),
            "{in_file}"
        );
        let unknown = resolve::<Sample>("", &set(&["optimiser.rate=1.0"])).unwrap_err().to_string();
        assert!(unknown.contains("optimiser.rate") && unknown.contains("`lr`"), "{unknown}");
        let typed = resolve::<Sample>("", &set(&["seed=soon"])).unwrap_err().to_string();
        assert!(typed.contains("seed") && typed.contains("soon"), "{typed}");
        let nested = resolve::<Sample>("", &set(&["seed=1", "seed.x=1"])).unwrap_err();
        assert!(matches!(nested, ConfigError::NotATable { .. }), "{nested}");
    }

    #[test]
    fn an_override_cannot_smuggle_in_other_keys() {
        let sample: Sample = resolve("", &set(&["name=x\nseed = 99"])).unwrap();
        assert_eq!((sample.seed, sample.name.as_str()), (7, "x\nseed = 99"));
        for text in ["seed", "=1", ".=1", "a..b=1"] {
            assert!(Override::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn several_runs_share_what_stands_outside_their_tables() {
        let text = "seed = 3\n[[run]]\nname = 'a'\n[[run]]\nname = 'b'\nseed = 4\n";
        let texts = expand(text, "run").unwrap();
        let seeds = texts
            .iter()
            .map(|(name, text)| (name.clone().unwrap(), resolve::<Sample>(text, &[]).unwrap().seed));
        assert_eq!(seeds.collect::<Vec<_>>(), [("a".to_owned(), 3), ("b".to_owned(), 4)]);
        assert_eq!(expand("seed = 1", "run").unwrap(), [(None, "seed = 1".to_owned())]);
        for broken in [
            "run = 3",
            "[[run]]\nseed = 1",
            "[[run]]\nname = '../x'",
            "[[run]]\nname = 'a'\n[[run]]\nname = 'a'",
            "run = []",
        ] {
            assert!(expand(broken, "run").unwrap_err().to_string().contains("`run`"), "{broken}");
        }
    }

    #[test]
    fn saved_and_read_again() {
        let sample = Sample::default();
        assert_eq!(resolve::<Sample>(&to_toml(&sample).unwrap(), &[]).unwrap(), sample);
    }
}
