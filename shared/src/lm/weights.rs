//! From named tensors to a decoder: which tensor goes where, of what shape, and what must not be left over.

use std::collections::BTreeSet;

use super::decoder::{Block, Decoder, Linear};
use super::ops::Ops;
use super::{LmError, Spec};

/// Named tensors, wherever they come from. Shapes are row-major: a linear layer's weight is `[out, in]`.
pub trait TensorSource {
    /// The names of all tensors.
    fn names(&self) -> Vec<String>;

    /// The shape of tensor `name`, if there is one.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The values of tensor `name` in f32, as many as its shape says.
    ///
    /// # Errors
    /// If there is no such tensor, it cannot be read, or its number format is not supported.
    fn read(&mut self, name: &str) -> Result<Vec<f32>, LmError>;
}

/// Everything needed to build a decoder from a [`TensorSource`]: what it is, and what its tensors are called.
#[derive(Debug, Clone, PartialEq)]
pub struct Blueprint {
    /// What the model is.
    pub spec: Spec,
    /// What its tensors are called.
    pub names: Names,
    /// Query and key rows are stored for interleaved rotary pairs `(2i, 2i + 1)` (GGUF files of the llama family)
    /// and must be brought into half-split order.
    pub interleaved_rope: bool,
}

/// The names of tensors; block tensors are `{block}{layer}.{name}.weight` and `….bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// The embedding table.
    pub embedding: &'static str,
    /// The final norm's gain.
    pub final_norm: &'static str,
    /// The unembedding; absent when tied.
    pub unembedding: &'static str,
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
    pub qkv: [&'static str; 3],
    /// The attention's output projection.
    pub out: &'static str,
    /// The MLP's gate and up projections.
    pub gate_up: [&'static str; 2],
    /// The MLP's down projection.
    pub down: &'static str,
    /// Endings of tensors that carry no weights of their own and are ignored.
    pub ignored: &'static [&'static str],
}

impl<O: Ops> Decoder<O> {
    /// Builds the decoder of `blueprint` from the tensors of `source`.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape, not finite, or has no place in the architecture.
    pub fn build(ops: O, blueprint: &Blueprint, source: &mut dyn TensorSource) -> Result<Self, LmError> {
        blueprint.spec.check()?;
        let mut loader = Loader { ops: &ops, blueprint, prefix: "", source, used: BTreeSet::new() };
        loader.find_prefix();
        let (spec, names) = (&blueprint.spec, &blueprint.names);
        let (vocab, d) = (spec.vocab_size, spec.d_model);
        let embedding = loader.read(names.embedding, &[vocab, d])?;
        let embedding = ops.matrix(embedding, vocab, d)?;
        let blocks = (0..spec.n_layers).map(|layer| loader.block(layer)).collect::<Result<_, _>>()?;
        let final_gain = loader.gain(names.final_norm)?;
        let final_norm = ops.vector(final_gain.clone())?;
        let unembedding = if spec.tied_embeddings {
            None
        } else {
            Some(ops.matrix(loader.read(names.unembedding, &[vocab, d])?, vocab, d)?)
        };
        loader.nothing_left_over()?;
        Ok(Self {
            spec: spec.clone(),
            inverse_frequencies: spec.attention.rope.inverse_frequencies(spec.attention.head_dim),
            embedding,
            blocks,
            final_gain,
            final_norm,
            unembedding,
            ops,
        })
    }
}

struct Loader<'a, O> {
    ops: &'a O,
    blueprint: &'a Blueprint,
    /// What the file leaves out at the front of every name.
    prefix: &'static str,
    source: &'a mut dyn TensorSource,
    used: BTreeSet<String>,
}

impl<O: Ops> Loader<'_, O> {
    /// A model saved without its language-modelling head has names without the leading `model.`.
    fn find_prefix(&mut self) {
        let embedding = self.blueprint.names.embedding;
        if let Some(short) = embedding.strip_prefix("model.")
            && self.source.shape(embedding).is_none()
            && self.source.shape(short).is_some()
        {
            self.prefix = "model.";
        }
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LmError> {
        let name = name.strip_prefix(self.prefix).unwrap_or(name).to_owned();
        let Some(found) = self.source.shape(&name) else {
            return Err(LmError::MissingTensor { name, shape: shape.to_vec() });
        };
        let values = if found == shape { self.source.read(&name)? } else { Vec::new() };
        if found != shape || values.len() != shape.iter().product::<usize>() {
            return Err(LmError::TensorShape { name, expected: shape.to_vec(), found });
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(LmError::NotFinite { name, index, value: values[index].to_string() });
        }
        self.used.insert(name);
        Ok(values)
    }

    /// A norm's gain, with the `1 +` that some families leave out of their files.
    fn gain(&mut self, name: &str) -> Result<Vec<f32>, LmError> {
        let mut gain = self.read(name, &[self.blueprint.spec.d_model])?;
        if self.blueprint.spec.norm.unit_offset {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    /// Projections stacked into one matrix: `parts` are names with their output widths.
    fn stacked(
        &mut self,
        layer: usize,
        parts: &[(&str, usize)],
        n_in: usize,
        bias: bool,
    ) -> Result<Linear<O>, LmError> {
        let block = self.blueprint.names.block;
        let n_out: usize = parts.iter().map(|(_, n)| n).sum();
        let (mut weight, mut biases) = (Vec::new(), Vec::new());
        for &(name, n) in parts {
            let values = self.read(&format!("{block}{layer}.{name}.weight"), &[n, n_in])?;
            weight.extend(self.half_split(name, values, n_in));
            if bias {
                let values = self.read(&format!("{block}{layer}.{name}.bias"), &[n])?;
                biases.extend(self.half_split(name, values, 1));
            }
        }
        let weight = self.ops.matrix(weight, n_out, n_in)?;
        let bias = if bias { Some(self.ops.vector(biases)?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// Query and key rows in half-split order, whatever order the file has them in.
    fn half_split(&self, name: &str, values: Vec<f32>, n_in: usize) -> Vec<f32> {
        let [query, key, _] = self.blueprint.names.qkv;
        if !self.blueprint.interleaved_rope || (name != query && name != key) {
            return values;
        }
        let half = self.blueprint.spec.attention.head_dim / 2;
        let mut out = Vec::with_capacity(values.len());
        for head in values.chunks_exact(2 * half * n_in) {
            for parity in 0..2 {
                for i in 0..half {
                    let row = 2 * i + parity;
                    out.extend_from_slice(&head[row * n_in..(row + 1) * n_in]);
                }
            }
        }
        out
    }

    fn block(&mut self, layer: usize) -> Result<Block<O>, LmError> {
        let (spec, names) = (&self.blueprint.spec, &self.blueprint.names);
        let attention = &spec.attention;
        let (d, q) = (spec.d_model, attention.n_heads * attention.head_dim);
        let kv = attention.n_kv_heads * attention.head_dim;
        let [query, key, value] = names.qkv;
        let qkv = self.stacked(layer, &[(query, q), (key, kv), (value, kv)], d, attention.qkv_bias)?;
        let out = self.stacked(layer, &[(names.out, d)], q, attention.out_bias)?;
        let [gate, up] = names.gate_up;
        let gate_up = self.stacked(layer, &[(gate, spec.d_ff), (up, spec.d_ff)], d, spec.mlp.bias)?;
        let down = self.stacked(layer, &[(names.down, d)], spec.d_ff, spec.mlp.bias)?;
        let mut norm = |name: &str| -> Result<O::Vector, LmError> {
            let gain = self.gain(&format!("{}{layer}.{name}.weight", names.block))?;
            self.ops.vector(gain)
        };
        Ok(Block {
            pre_attention: norm(names.pre_attention)?,
            post_attention: names.post_attention.map(&mut norm).transpose()?,
            pre_mlp: norm(names.pre_mlp)?,
            post_mlp: names.post_mlp.map(&mut norm).transpose()?,
            qkv,
            out,
            gate_up,
            down,
        })
    }

    fn nothing_left_over(&self) -> Result<(), LmError> {
        let names = &self.blueprint.names;
        let mut left: Vec<String> = self.source.names();
        left.retain(|name| {
            let copy_of_embedding = self.blueprint.spec.tied_embeddings && name == names.unembedding;
            let ignored = copy_of_embedding || names.ignored.iter().any(|ending| name.ends_with(ending));
            !(ignored || self.used.contains(name))
        });
        left.sort_unstable();
        let count = left.len();
        match left.into_iter().next() {
            None => Ok(()),
            Some(first) => Err(LmError::UnknownTensors { first, count }),
        }
    }
}
