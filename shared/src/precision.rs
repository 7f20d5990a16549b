//! The number format of a language model's matrices while it runs.

use serde::{Deserialize, Serialize};

/// How matrices are kept and multiplied. Activations between products, norms and attention are f32 in all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 throughout.
    #[default]
    F32,
    /// Weights and the inputs of products rounded to bf16, products summed in f32.
    Bf16,
    /// Weights and the inputs of products as 8-bit integers, in blocks of 32 values with one scale each.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl Precision {
    /// All of them, most exact first.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Q8_0];

    /// The name used in configurations and options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| format!("expected f32, bf16 or q8_0, found `{text}`"))
    }
}
