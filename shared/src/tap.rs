//! Where activations are read in a transformer: sites, tap points and their one spelling (`resid.14`).
//!
//! Lives outside feature `lm`, so that everything that only names a tap (the page, metadata, configs) needs no transformer.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A place in a transformer block where an activation vector is read or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// The residual stream that enters block 0: the embedding after its scaling, with the learned position added
    /// where the model has one; only layer 0 has it. Width `d_model`.
    Embed,
    /// The residual stream after the block's MLP was added. Width `d_model`.
    Resid,
    /// What the MLP adds to the residual stream, after the post-norm where there is one. Width `d_model`.
    Mlp,
    /// The concatenated head outputs before the output projection. Width `n_heads · head_dim`.
    Attn,
    /// What a transcoder reads: the residual stream normalised for the MLP, without the norm's gain and bias
    /// (`x / rms(x)`, or `(x − mean) / std` where the model uses layer norms). Width `d_model`.
    #[serde(rename = "mlp_in")]
    MlpIn,
}

impl Site {
    /// Every site, in the order of [`Ord`].
    pub const ALL: [Self; 5] = [Self::Embed, Self::Resid, Self::Mlp, Self::Attn, Self::MlpIn];

    /// The name used in files, flags and addresses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Resid => "resid",
            Self::Mlp => "mlp",
            Self::Attn => "attn",
            Self::MlpIn => "mlp_in",
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Site {
    type Err = TapParseError;

    fn from_str(text: &str) -> Result<Self, TapParseError> {
        Self::ALL
            .into_iter()
            .find(|site| site.name() == text)
            .ok_or_else(|| TapParseError::Site(text.to_owned()))
    }
}

/// A site of one layer (0-indexed block), written `site.layer`: `resid.14`, `mlp.3`, `attn.0`, `embed.0`.
/// Serialised as that string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TapPoint {
    /// The place in the block.
    pub site: Site,
    /// The 0-indexed block; 0 for [`Site::Embed`].
    pub layer: usize,
}

impl TapPoint {
    /// The point `site.layer`.
    #[must_use]
    pub fn new(site: Site, layer: usize) -> Self {
        Self { site, layer }
    }
}

impl fmt::Display for TapPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.site, self.layer)
    }
}

impl FromStr for TapPoint {
    type Err = TapParseError;

    fn from_str(text: &str) -> Result<Self, TapParseError> {
        let malformed = || TapParseError::Point(text.to_owned());
        let (site, layer) = text.split_once('.').ok_or_else(malformed)?;
        let site = site.parse()?;
        if layer.is_empty() || !layer.bytes().all(|b| b.is_ascii_digit()) {
            return Err(malformed());
        }
        let layer = layer.parse().map_err(|_| malformed())?;
        if site == Site::Embed && layer != 0 {
            return Err(TapParseError::EmbedLayer(layer));
        }
        Ok(Self { site, layer })
    }
}

impl TryFrom<String> for TapPoint {
    type Error = TapParseError;

    fn try_from(text: String) -> Result<Self, TapParseError> {
        text.parse()
    }
}

impl From<TapPoint> for String {
    fn from(point: TapPoint) -> Self {
        point.to_string()
    }
}

/// Text that does not name a site or a tap point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TapParseError {
    /// Not a known site.
    #[error("`{0}` is not a site; expected embed, resid, mlp, attn or mlp_in")]
    Site(String),
    /// Not of the form `site.layer`.
    #[error("`{0}` is not a tap; expected site.layer, for example resid.14, mlp.3, attn.0 or embed.0")]
    Point(String),
    /// The embedding exists once.
    #[error("embed.{0} does not exist: the embedding comes before block 0 and is called embed.0")]
    EmbedLayer(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_round_trip_through_text_and_json() {
        for text in ["embed.0", "resid.14", "mlp.3", "attn.0", "mlp_in.7"] {
            let point: TapPoint = text.parse().unwrap();
            assert_eq!(point.to_string(), text);
            let json = serde_json::to_string(&point).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<TapPoint>(&json).unwrap(), point);
        }
        for site in Site::ALL {
            assert_eq!(serde_json::to_string(&site).unwrap(), format!("\"{site}\""));
            assert_eq!(site.name().parse(), Ok(site));
        }
    }

    #[test]
    fn refuses_what_is_no_point() {
        for text in
            ["", "resid", "resid.", "resid.-1", "resid.+1", "Resid.1", "residual.1", "resid.1.2", "embed.1"]
        {
            assert!(text.parse::<TapPoint>().is_err(), "{text}");
        }
        assert!("resid.99999999999999999999999".parse::<TapPoint>().is_err());
    }
}
