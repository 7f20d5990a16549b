//! Sparse latent activations of a batch: for each row, the active latents and their values.

use crate::error::ShapeError;

/// Latent activations `[n_rows, n_latents]` in compressed sparse rows.
///
/// Within a row latents ascend strictly, so two codes of the same activations are equal as values.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    n_latents: usize,
    offsets: Vec<usize>,
    latents: Vec<u32>,
    values: Vec<f32>,
}

impl Codes {
    /// The width of the dictionary these codes index.
    #[must_use]
    pub fn n_latents(&self) -> usize {
        self.n_latents
    }

    /// The number of rows (tokens).
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The number of active (row, latent) pairs; divided by [`Codes::n_rows`] it is the mean L0.
    #[must_use]
    pub fn n_active(&self) -> usize {
        self.latents.len()
    }

    /// The active latents of row `i` (ascending) and their values.
    #[must_use]
    pub fn row(&self, i: usize) -> (&[u32], &[f32]) {
        let range = self.offsets[i]..self.offsets[i + 1];
        (&self.latents[range.clone()], &self.values[range])
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u32], &[f32])> {
        (0..self.n_rows()).map(|i| self.row(i))
    }

    /// The dense `[n_rows, n_latents]` matrix; for tests and file output, never for computing.
    #[must_use]
    pub fn to_dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.n_rows() * self.n_latents];
        for (i, (latents, values)) in self.iter().enumerate() {
            for (&latent, &value) in latents.iter().zip(values) {
                dense[i * self.n_latents + latent as usize] = value;
            }
        }
        dense
    }
}

/// Builds [`Codes`] row by row.
#[derive(Debug, Clone)]
pub struct CodesBuilder {
    codes: Codes,
}

impl CodesBuilder {
    /// An empty batch over a dictionary of `n_latents`.
    #[must_use]
    pub fn new(n_latents: usize) -> Self {
        Self { codes: Codes { n_latents, offsets: vec![0], latents: Vec::new(), values: Vec::new() } }
    }

    /// Adds an active latent to the current row; latents of a row may come in any order.
    pub fn push(&mut self, latent: u32, value: f32) {
        self.codes.latents.push(latent);
        self.codes.values.push(value);
    }

    /// Ends the current row.
    ///
    /// # Errors
    /// If a latent is out of range or was pushed twice in this row.
    pub fn end_row(&mut self) -> Result<(), ShapeError> {
        let codes = &mut self.codes;
        let start = codes.offsets.last().copied().unwrap_or(0);
        let (latents, values) = (&mut codes.latents[start..], &mut codes.values[start..]);
        if !latents.is_sorted() {
            let mut order: Vec<(u32, f32)> = latents.iter().copied().zip(values.iter().copied()).collect();
            order.sort_unstable_by_key(|&(latent, _)| latent);
            for (k, (latent, value)) in order.into_iter().enumerate() {
                (latents[k], values[k]) = (latent, value);
            }
        }
        for (k, &latent) in latents.iter().enumerate() {
            if latent as usize >= codes.n_latents || (k > 0 && latents[k - 1] == latent) {
                return Err(ShapeError::Latent { latent, entry: start + k, n_latents: codes.n_latents });
            }
        }
        codes.offsets.push(codes.latents.len());
        Ok(())
    }

    /// The finished codes; entries pushed after the last [`CodesBuilder::end_row`] are dropped.
    #[must_use]
    pub fn finish(mut self) -> Codes {
        let end = self.codes.offsets.last().copied().unwrap_or(0);
        self.codes.latents.truncate(end);
        self.codes.values.truncate(end);
        self.codes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_out_sorted() {
        let mut builder = CodesBuilder::new(4);
        builder.push(3, 0.5);
        builder.push(1, 2.0);
        builder.end_row().unwrap();
        builder.end_row().unwrap();
        let codes = builder.finish();
        assert_eq!(codes.row(0), (&[1u32, 3][..], &[2.0f32, 0.5][..]));
        assert_eq!((codes.n_rows(), codes.n_active()), (2, 2));
        assert_eq!(codes.to_dense(), [0.0, 2.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn duplicates_and_strays_are_refused() {
        let mut twice = CodesBuilder::new(4);
        twice.push(1, 1.0);
        twice.push(1, 2.0);
        assert!(twice.end_row().is_err());
        let mut outside = CodesBuilder::new(4);
        outside.push(4, 1.0);
        assert!(outside.end_row().is_err());
    }
}
