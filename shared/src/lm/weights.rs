//! From named tensors to a decoder: which tensor goes where, of what shape, and what must not be left over.
//!
//! Tensors are read straight into the buffers the decoder keeps. Only what must be turned over on the way (the
//! transposed matrices of GPT-2, the interleaved heads of GPT-NeoX) is held a second time, one tensor at a time.

use std::collections::BTreeSet;

use super::decoder::{Block, Decoder, Linear, Norm};
use super::names::{Names, Qkv};
use super::ops::Ops;
use super::{LmError, Spec};

/// Named tensors, wherever they come from. Shapes are row-major: a linear layer's weight is `[out, in]`.
pub trait TensorSource {
    /// The names of all tensors.
    fn names(&self) -> Vec<String>;

    /// The shape of tensor `name`, if there is one.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Fills `out` with the values of tensor `name` in f32; `out` is as long as its shape says.
    ///
    /// # Errors
    /// If there is no such tensor, it has another size, it cannot be read, or its number format is not supported.
    fn read(&mut self, name: &str, out: &mut [f32]) -> Result<(), LmError>;
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

impl<O: Ops> Decoder<O> {
    /// Builds the decoder of `blueprint` from the tensors of `source`.
    ///
    /// # Errors
    /// If a tensor is missing, of another shape, not finite, or has no place in the architecture.
    pub fn build(ops: O, blueprint: &Blueprint, source: &mut dyn TensorSource) -> Result<Self, LmError> {
        blueprint.spec.check()?;
        let (spec, names) = (&blueprint.spec, &blueprint.names);
        let (body, unembedding_name) = names.spelling(source);
        let mut loader = Loader { ops: &ops, blueprint, body, source, used: BTreeSet::new() };
        let (vocab, d) = (spec.vocab_size, spec.d_model);
        let embedding = ops.matrix(loader.read(&loader.in_body(names.embedding), &[vocab, d])?, vocab, d)?;
        let positions = match names.positions.filter(|_| spec.learned_positions) {
            Some(name) => {
                let n = spec.context_length;
                Some(ops.matrix(loader.read(&loader.in_body(name), &[n, d])?, n, d)?)
            }
            None => None,
        };
        let blocks = (0..spec.n_layers).map(|layer| loader.block(layer)).collect::<Result<_, _>>()?;
        let final_name = loader.in_body(names.final_norm);
        let final_gain = loader.gain(&final_name, d)?;
        let final_norm = Norm { gain: ops.vector(final_gain.clone())?, bias: loader.norm_bias(&final_name)? };
        let unembedding = if spec.tied_embeddings {
            None
        } else {
            Some(ops.matrix(loader.read(unembedding_name, &[vocab, d])?, vocab, d)?)
        };
        loader.nothing_left_over()?;
        Ok(Self {
            spec: spec.clone(),
            embedding,
            positions,
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
    /// What every name of the body begins with in this file.
    body: &'static str,
    source: &'a mut dyn TensorSource,
    used: BTreeSet<String>,
}

/// A linear layer in a file.
struct Stored<'a> {
    name: &'a str,
    n_out: usize,
    n_in: usize,
}

impl<O: Ops> Loader<'_, O> {
    fn in_body(&self, name: &str) -> String {
        format!("{}{name}", self.body)
    }

    fn in_block(&self, layer: usize, name: &str) -> String {
        format!("{}{}{layer}.{name}", self.body, self.blueprint.names.block)
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LmError> {
        self.expect(name, shape)?;
        let mut values = vec![0f32; shape.iter().product()];
        self.read_into(name, shape, &mut values)?;
        Ok(values)
    }

    /// Refuses a tensor that is missing or of another shape, before any memory is asked for.
    fn expect(&self, name: &str, shape: &[usize]) -> Result<(), LmError> {
        let name = name.to_owned();
        match self.source.shape(&name) {
            None => Err(LmError::MissingTensor { name, shape: shape.to_vec() }),
            Some(found) if found != shape => {
                Err(LmError::TensorShape { name, expected: shape.to_vec(), found })
            }
            Some(_) => Ok(()),
        }
    }

    fn read_into(&mut self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<(), LmError> {
        self.expect(name, shape)?;
        self.source.read(name, out)?;
        if let Some(index) = out.iter().position(|v| !v.is_finite()) {
            let value = out[index].to_string();
            return Err(LmError::NotFinite { name: name.to_owned(), index, value });
        }
        self.used.insert(name.to_owned());
        Ok(())
    }

    /// The gain of the norm `name`, with the `1 +` that some families leave out of their files.
    fn gain(&mut self, name: &str, width: usize) -> Result<Vec<f32>, LmError> {
        let mut gain = self.read(&format!("{name}.weight"), &[width])?;
        if self.blueprint.spec.norm.unit_offset {
            gain.iter_mut().for_each(|g| *g += 1.0);
        }
        Ok(gain)
    }

    fn norm_bias(&mut self, name: &str) -> Result<Option<O::Vector>, LmError> {
        if !self.blueprint.spec.norm.bias {
            return Ok(None);
        }
        let bias = self.read(&format!("{name}.bias"), &[self.blueprint.spec.d_model])?;
        self.ops.vector(bias).map(Some)
    }

    fn norm(&mut self, layer: usize, name: &str) -> Result<Norm<O>, LmError> {
        let name = self.in_block(layer, name);
        let gain = self.gain(&name, self.blueprint.spec.d_model)?;
        Ok(Norm { gain: self.ops.vector(gain)?, bias: self.norm_bias(&name)? })
    }

    /// Projections stacked into one matrix.
    fn stacked(&mut self, layer: usize, parts: &[Stored<'_>], bias: bool) -> Result<Linear<O>, LmError> {
        let n_in = parts.first().map_or(0, |part| part.n_in);
        let n_out: usize = parts.iter().map(|part| part.n_out).sum();
        for part in parts {
            self.expect(&self.weight_name(layer, part), &self.stored_shape(part))?;
        }
        let (mut weight, mut biases) = (vec![0f32; n_out * n_in], vec![0f32; if bias { n_out } else { 0 }]);
        let mut first = 0;
        for part in parts {
            let rows = first..first + part.n_out;
            self.weight(layer, part, &mut weight[rows.start * n_in..rows.end * n_in])?;
            if bias {
                let name = self.in_block(layer, &format!("{}.bias", part.name));
                let out = &mut biases[rows];
                self.read_into(&name, &[part.n_out], out)?;
                self.in_order(part.name, out, 1);
            }
            first += part.n_out;
        }
        let weight = self.ops.matrix(weight, n_out, n_in)?;
        let bias = if bias { Some(self.ops.vector(biases)?) } else { None };
        Ok(Linear { weight, bias })
    }

    fn weight_name(&self, layer: usize, part: &Stored<'_>) -> String {
        self.in_block(layer, &format!("{}.weight", part.name))
    }

    fn stored_shape(&self, part: &Stored<'_>) -> [usize; 2] {
        if self.blueprint.names.transposed { [part.n_in, part.n_out] } else { [part.n_out, part.n_in] }
    }

    /// One linear layer's weight, `[out, in]` with its rows in the decoder's order.
    fn weight(&mut self, layer: usize, part: &Stored<'_>, out: &mut [f32]) -> Result<(), LmError> {
        let (name, shape) = (self.weight_name(layer, part), self.stored_shape(part));
        if self.blueprint.names.transposed {
            let stored = self.read(&name, &shape)?;
            for (i, column) in stored.chunks_exact(part.n_out).enumerate() {
                for (o, &value) in column.iter().enumerate() {
                    out[o * part.n_in + i] = value;
                }
            }
        } else {
            self.read_into(&name, &shape, out)?;
        }
        self.in_order(part.name, out, part.n_in);
        Ok(())
    }

    /// Brings the rows (`n_in` values each) of query, key and value projections into the decoder's order: queries, keys,
    /// values, and rotary pairs half a head apart.
    fn in_order(&self, name: &str, rows: &mut [f32], n_in: usize) {
        let attention = &self.blueprint.spec.attention;
        let head = attention.head_dim * n_in;
        match self.blueprint.names.qkv {
            Qkv::HeadByHead(fused) if name == fused => {
                let stored = rows.to_vec();
                for (i, values) in stored.chunks_exact(head).enumerate() {
                    // The file has query, key and value of head 0, then those of head 1, …
                    let place = (i % 3 * attention.n_heads + i / 3) * head;
                    rows[place..place + head].copy_from_slice(values);
                }
            }
            Qkv::Separate([query, key, _])
                if self.blueprint.interleaved_rope && (name == query || name == key) =>
            {
                for rows in rows.chunks_exact_mut(head) {
                    let stored = rows.to_vec();
                    for (i, row) in stored.chunks_exact(n_in).enumerate() {
                        let place = (i % 2 * (attention.head_dim / 2) + i / 2) * n_in;
                        rows[place..place + n_in].copy_from_slice(row);
                    }
                }
            }
            _ => {}
        }
    }

    fn block(&mut self, layer: usize) -> Result<Block<O>, LmError> {
        let (spec, names) = (&self.blueprint.spec, &self.blueprint.names);
        let attention = &spec.attention;
        let (d, d_ff, q) = (spec.d_model, spec.d_ff, attention.n_heads * attention.head_dim);
        let kv = attention.n_kv_heads * attention.head_dim;
        let stored = |name, n_out, n_in| Stored { name, n_out, n_in };
        let qkv = match names.qkv {
            Qkv::Separate([query, key, value]) => {
                vec![stored(query, q, d), stored(key, kv, d), stored(value, kv, d)]
            }
            Qkv::Stacked(fused) | Qkv::HeadByHead(fused) => vec![stored(fused, q + 2 * kv, d)],
        };
        let up: Vec<_> = names.up.iter().map(|name| stored(name, d_ff, d)).collect();
        let mut gain = |name: Option<&str>| match name.filter(|_| attention.qk_norm) {
            Some(name) => {
                let gain = self.gain(&self.in_block(layer, name), attention.head_dim)?;
                self.ops.vector(gain).map(Some)
            }
            None => Ok(None),
        };
        Ok(Block {
            query_gain: gain(names.qk_norm.map(|names| names[0]))?,
            key_gain: gain(names.qk_norm.map(|names| names[1]))?,
            qkv: self.stacked(layer, &qkv, attention.qkv_bias)?,
            out: self.stacked(layer, &[stored(names.out, d, q)], attention.out_bias)?,
            up: self.stacked(layer, &up, spec.mlp.bias)?,
            down: self.stacked(layer, &[stored(names.down, d, d_ff)], spec.mlp.bias)?,
            pre_attention: self.norm(layer, names.pre_attention)?,
            post_attention: names.post_attention.map(|name| self.norm(layer, name)).transpose()?,
            pre_mlp: self.norm(layer, names.pre_mlp)?,
            post_mlp: names.post_mlp.map(|name| self.norm(layer, name)).transpose()?,
        })
    }

    fn nothing_left_over(&self) -> Result<(), LmError> {
        let (names, tied) = (&self.blueprint.names, self.blueprint.spec.tied_embeddings);
        let mut left: Vec<String> = self.source.names();
        left.retain(|name| {
            let copy_of_embedding = tied && names.spellings.iter().any(|(_, copy)| name == copy);
            let foreign = names.foreign.iter().any(|start| name.starts_with(start));
            let ignored = names.ignored.iter().any(|ending| name.ends_with(ending));
            !(copy_of_embedding || foreign || ignored || self.used.contains(name))
        });
        left.sort_unstable();
        let count = left.len();
        match left.into_iter().next() {
            None => Ok(()),
            Some(first) => Err(LmError::UnknownTensors { first, count }),
        }
    }
}
