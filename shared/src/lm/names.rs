//! What a family calls its tensors.

use super::TensorSource;

/// The names of tensors. Those of the body follow a prefix that files spell differently; block tensors are
/// `{prefix}{block}{layer}.{name}.weight` and `….bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// How files may begin the names of the body, and what the unembedding (absent when tied) is called with it; the
    /// first is the usual one.
    pub spellings: &'static [(&'static str, &'static str)],
    /// The embedding table.
    pub embedding: &'static str,
    /// The table of learned positions, where there is one.
    pub positions: Option<&'static str>,
    /// The final norm, without `.weight`.
    pub final_norm: &'static str,
    /// What block tensors begin with.
    pub block: &'static str,
    /// The norm before attention.
    pub pre_attention: &'static str,
    /// The norm after attention, where there is one.
    pub post_attention: Option<&'static str>,
    /// The norm before the MLP.
    pub pre_mlp: &'static str,
    /// The norm after the MLP, where there is one.
    pub post_mlp: Option<&'static str>,
    /// Query, key and value projections.
    pub qkv: Qkv,
    /// The norms of query and key heads, where there are any.
    pub qk_norm: Option<[&'static str; 2]>,
    /// The attention's output projection.
    pub out: &'static str,
    /// The MLP's gate and up projections, or up alone.
    pub up: &'static [&'static str],
    /// The MLP's down projection.
    pub down: &'static str,
    /// Whether the weights of linear layers in blocks are stored `[in, out]`.
    pub transposed: bool,
    /// Endings of tensors that carry no weights of their own and are ignored.
    pub ignored: &'static [&'static str],
    /// Beginnings of tensors of another part of the model (an image encoder), which are ignored.
    pub foreign: &'static [&'static str],
}

/// How query, key and value projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// In three tensors.
    Separate([&'static str; 3]),
    /// In one tensor: all queries, all keys, all values.
    Stacked(&'static str),
    /// In one tensor: query, key and value of the first head, then those of the second, and so on.
    HeadByHead(&'static str),
}

/// The names of a Hugging Face Llama; others change what differs.
pub(super) const LLAMA: Names = Names {
    spellings: &[("model.", "lm_head.weight"), ("", "lm_head.weight")],
    embedding: "embed_tokens.weight",
    positions: None,
    final_norm: "norm",
    block: "layers.",
    pre_attention: "input_layernorm",
    post_attention: None,
    pre_mlp: "post_attention_layernorm",
    post_mlp: None,
    qkv: Qkv::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norm: None,
    out: "self_attn.o_proj",
    up: &["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    transposed: false,
    ignored: &["rotary_emb.inv_freq"],
    foreign: &[],
};

/// The names of a GGUF of the Llama layout; others change what differs.
pub(super) const GGUF: Names = Names {
    spellings: &[("", "output.weight")],
    embedding: "token_embd.weight",
    final_norm: "output_norm",
    block: "blk.",
    pre_attention: "attn_norm",
    pre_mlp: "ffn_norm",
    qkv: Qkv::Separate(["attn_q", "attn_k", "attn_v"]),
    out: "attn_output",
    up: &["ffn_gate", "ffn_up"],
    down: "ffn_down",
    ignored: &["rope_freqs.weight"],
    ..LLAMA
};

impl Names {
    /// The spelling of `source`: the one under which it holds the embedding and, if any does, the unembedding.
    pub(super) fn spelling(&self, source: &dyn TensorSource) -> (&'static str, &'static str) {
        let holds = |name: &str| source.shape(name).is_some();
        let fits = |(body, _): &&(&str, &str)| holds(&format!("{body}{}", self.embedding));
        let whole = self.spellings.iter().filter(fits).find(|(_, unembedding)| holds(unembedding));
        let found = whole.or(self.spellings.iter().find(fits)).or(self.spellings.first());
        found.copied().unwrap_or_default()
    }
}
