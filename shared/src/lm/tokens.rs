//! A batch of token sequences of one length, and the next-token loss over it.

use super::LmError;

/// Token ids `[batch, seq]`, batch-major: whole sequences of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBatch<'a> {
    ids: &'a [u32],
    seq: usize,
}

impl<'a> TokenBatch<'a> {
    /// Views `ids` as sequences of `seq` tokens.
    ///
    /// # Errors
    /// If `seq` is zero, `ids` is empty, or the ids do not fill whole sequences.
    pub fn new(ids: &'a [u32], seq: usize) -> Result<Self, LmError> {
        if seq == 0 || ids.is_empty() || !ids.len().is_multiple_of(seq) {
            return Err(LmError::Tokens { ids: ids.len(), seq });
        }
        Ok(Self { ids, seq })
    }

    /// All ids, sequence after sequence.
    #[must_use]
    pub fn ids(&self) -> &'a [u32] {
        self.ids
    }

    /// The length of every sequence.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The number of sequences.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.ids.len() / self.seq
    }

    /// The number of tokens in all sequences together.
    #[must_use]
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    /// Sequence `i`. Panics when `i` is not below [`TokenBatch::batch`], as slice indexing does.
    #[must_use]
    pub fn sequence(&self, i: usize) -> &'a [u32] {
        &self.ids[i * self.seq..(i + 1) * self.seq]
    }
}

/// −log p of each next token, `[batch, seq − 1]` in nats, from logits `[batch · seq, vocab]`.
/// The log-sum-exp is taken in f64. Empty for sequences of one token.
///
/// # Panics
/// When `logits` holds fewer than `tokens.n_tokens() · vocab` values or a token is not below `vocab`;
/// the model has checked both for what it returns.
#[must_use]
pub fn nll(logits: &[f32], vocab: usize, tokens: TokenBatch<'_>) -> Vec<f32> {
    let mut losses = Vec::with_capacity(tokens.batch() * (tokens.seq - 1));
    for s in 0..tokens.batch() {
        let ids = tokens.sequence(s);
        for (t, &next) in ids.iter().enumerate().skip(1) {
            let row = s * tokens.seq + t - 1;
            losses.push(token_nll(&logits[row * vocab..(row + 1) * vocab], next));
        }
    }
    losses
}

/// −log softmax(`row`)`[next]` in nats, summed in f64.
pub(crate) fn token_nll(row: &[f32], next: u32) -> f32 {
    (log_sum_exp(row) - f64::from(row[next as usize])) as f32
}

/// What one prediction of a changed model costs, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// −log of the probability of the token that came next.
    pub nll: f32,
    /// `KL(untouched ‖ changed)` of the predicted distributions.
    pub kl: f32,
}

/// [`token_nll`] of the logits `q`, and `KL(softmax(p) ‖ softmax(q))` in nats, summed in f64.
pub(crate) fn nll_and_kl(p: &[f32], q: &[f32], next: u32) -> [f32; 2] {
    let largest = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let q_total = log_sum_exp(q);
    // Σ softmax(p)ᵢ (pᵢ − qᵢ) − log Σ eᵖ + log Σ e^q: one exponential a logit, as in `log_sum_exp`.
    let (mut weights, mut products) = ([0f64; 8], [0f64; 8]);
    let ((p_chunks, p_rest), (q_chunks, q_rest)) = (p.as_chunks::<8>(), q.as_chunks::<8>());
    for (p, q) in p_chunks.iter().zip(q_chunks) {
        for lane in 0..8 {
            let weight = f64::from(super::math::exp(p[lane] - largest));
            weights[lane] += weight;
            products[lane] += weight * (f64::from(p[lane]) - f64::from(q[lane]));
        }
    }
    for (&p, &q) in p_rest.iter().zip(q_rest) {
        let weight = f64::from(super::math::exp(p - largest));
        weights[0] += weight;
        products[0] += weight * (f64::from(p) - f64::from(q));
    }
    let (weight, product) = (weights.iter().sum::<f64>(), products.iter().sum::<f64>());
    let kl = product / weight - (f64::from(largest) + weight.ln()) + q_total;
    [(q_total - f64::from(q[next as usize])) as f32, kl as f32]
}

/// log Σ exp of a row of logits, summed in f64.
fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Differences are taken in f64 but exponentiated in f32 lanes of eight partial sums: an error of 1 ulp a term
    // averages out, and the sum itself is f64.
    let mut sums = [0f64; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (sum, &logit) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(super::math::exp(logit - largest));
        }
    }
    for &logit in rest {
        sums[0] += f64::from(super::math::exp(logit - largest));
    }
    f64::from(largest) + sums.iter().sum::<f64>().ln()
}
