//! What an autoencoder was trained on, in our words, and the hook names other tools use for it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::multi_layer::MultiLayer;
use crate::tap::{Site, TapPoint};

/// What is known about the data an autoencoder reads. Everything is optional: released files say little.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SaeMetadata {
    /// The language model, by its hub or TransformerLens name.
    pub model_name: Option<String>,
    /// The tap, when it is known in our terms.
    pub tap: Option<TapPoint>,
    /// The tap a transcoder reconstructs.
    pub target: Option<TapPoint>,
    /// The layers of a multi-layer SAE, which has no tap of its own.
    pub layers: Option<MultiLayer>,
    /// The hook's name in TransformerLens terms, such as `blocks.20.hook_resid_post`.
    pub hook_name: Option<String>,
    /// Tokens per training sequence.
    pub context_size: Option<usize>,
    /// Whether sequences began with a BOS token.
    pub prepend_bos: Option<bool>,
    /// Everything else worth keeping: training configuration, data, foreign metadata.
    pub provenance: Map<String, Value>,
}

impl SaeMetadata {
    /// The hook name to write for other tools: the recorded one, else the one of the tap.
    #[must_use]
    pub fn hook_name_for_export(&self) -> Option<String> {
        self.hook_name.clone().or_else(|| self.tap.map(hook_name))
    }
}

/// TransformerLens' name of a tap.
#[must_use]
pub fn hook_name(tap: TapPoint) -> String {
    let layer = tap.layer;
    match tap.site {
        Site::Resid => format!("blocks.{layer}.hook_resid_post"),
        Site::Mlp => format!("blocks.{layer}.hook_mlp_out"),
        Site::Attn => format!("blocks.{layer}.attn.hook_z"),
        Site::Embed => "hook_embed".to_owned(),
        Site::MlpIn => format!("blocks.{layer}.ln2.hook_normalized"),
    }
}

/// The tap a TransformerLens hook name means, where it is one of ours.
/// `blocks.L.hook_resid_pre` is the output of block `L − 1`.
#[must_use]
pub fn tap_of_hook(hook: &str) -> Option<TapPoint> {
    if hook == "hook_embed" {
        return Some(TapPoint::new(Site::Embed, 0));
    }
    let (layer, point) = hook.strip_prefix("blocks.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    match point {
        "hook_resid_post" => Some(TapPoint::new(Site::Resid, layer)),
        "hook_resid_pre" => Some(TapPoint::new(Site::Resid, layer.checked_sub(1)?)),
        "hook_mlp_out" => Some(TapPoint::new(Site::Mlp, layer)),
        "attn.hook_z" => Some(TapPoint::new(Site::Attn, layer)),
        "ln2.hook_normalized" => Some(TapPoint::new(Site::MlpIn, layer)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hook_names_round_trip() {
        for (site, layer) in
            [(Site::Resid, 14), (Site::Mlp, 0), (Site::Attn, 3), (Site::Embed, 0), (Site::MlpIn, 5)]
        {
            let tap = TapPoint::new(site, layer);
            assert_eq!(tap_of_hook(&hook_name(tap)), Some(tap));
        }
        assert_eq!(tap_of_hook("blocks.3.hook_resid_pre"), Some(TapPoint::new(Site::Resid, 2)));
        assert_eq!(tap_of_hook("blocks.0.hook_resid_pre"), None);
        assert_eq!(tap_of_hook("blocks.99999999999999999999.hook_mlp_out"), None);
    }
}
