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

/// `KL(softmax(p) ‖ softmax(q))` in nats of two rows of logits of one length, summed in f64.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f32 {
    let (p_total, q_total) = (log_sum_exp(p), log_sum_exp(q));
    // Σ pᵢ (log pᵢ − log qᵢ), with log pᵢ = logit − log-sum-exp.
    let mut sums = [0f64; 8];
    let term = |p: f32, q: f32| {
        let log_p = f64::from(p) - p_total;
        f64::from(super::math::exp(log_p as f32)) * (log_p - (f64::from(q) - q_total))
    };
    let ((p_chunks, p_rest), (q_chunks, q_rest)) = (p.as_chunks::<8>(), q.as_chunks::<8>());
    for (p, q) in p_chunks.iter().zip(q_chunks) {
        for ((sum, &p), &q) in sums.iter_mut().zip(p).zip(q) {
            *sum += term(p, q);
        }
    }
    let rest: f64 = p_rest.iter().zip(q_rest).map(|(&p, &q)| term(p, q)).sum();
    (sums.iter().sum::<f64>() + rest) as f32
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
