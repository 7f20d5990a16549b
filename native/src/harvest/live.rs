//! A harvest that never touches the disk: buckets of shuffled vectors, made from the language model when they are asked for.
//!
//! A bucket follows from the configuration and its number alone, so a run that was stopped in the middle of one makes
//! it again. A training bucket holds what the same bucket of a store would hold, bit for bit.

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use shared::config::Count;
use shared::config::harvest::{HarvestConfig, StoreDtype};
use shared::format::SaeMetadata;
use shared::tap::TapPoint;

use super::feed::Feed;
use super::partial::dropped;
use super::plan::{self, Bucket, Keep};
use super::sequences::corpus;
use super::source;
use super::{spool, taps};
use crate::model::LoadedModel;
use crate::stop::{StopFlag, Stopped};
use crate::store::manifest::{Dropped, TokenizerInfo};
use crate::store::{self, Split, Tokens};

/// Held-out vectors made at a time: a measurement takes a few of them only.
const HELD_OUT_BUCKET: u64 = 10_000;

/// The vectors of some taps, straight from a language model.
pub struct Live {
    config: HarvestConfig,
    loaded: LoadedModel,
    tokenizer: TokenizerInfo,
    dropped: Dropped,
    /// Ascending, with the width of each.
    taps: Vec<(TapPoint, usize)>,
    halves: [Tokens; 2],
    plans: [Vec<Bucket>; 2],
    provenance: Value,
    stop: StopFlag,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("config", &self.config).field("taps", &self.taps).finish_non_exhaustive()
    }
}

impl Live {
    /// Reads and tokenises the text of `config`; the model runs later, as far as the last of its taps.
    ///
    /// # Errors
    /// If the configuration asks for what the model does not have, the text is too short, or `stop` was raised.
    pub fn new(config: &HarvestConfig, loaded: LoadedModel, stop: &StopFlag) -> Result<Self> {
        config.validate()?;
        let taps = taps(config, &loaded.model)?;
        let tokenizer = source::tokenizer_info(&loaded.tokenizer, config)?;
        let corpus = corpus(config, &loaded.tokenizer, &tokenizer, stop)?;
        let dropped = dropped(config);
        let keep = Keep { tokenizer: &tokenizer, dropped: &dropped };
        let [train, held_out] = &corpus.halves;
        let most = config.live_bucket_rows(taps.iter().map(|tap| tap.1).sum());
        let config =
            &HarvestConfig { bucket_vectors: Some(Count(most)), shard_vectors: None, ..config.clone() };
        let plans =
            [plan::buckets(train, keep, most), plan::buckets(held_out, keep, most.min(HELD_OUT_BUCKET))];
        ensure!(
            !plans[0].is_empty(),
            "no training vector is left after special tokens and drop_positions are dropped"
        );
        // Which other taps are read beside one changes none of its vectors.
        let harvest = HarvestConfig { taps: Vec::new(), ..config.clone() };
        let provenance =
            json!({ "live": { "model": loaded.provenance, "harvest": harvest, "text": corpus.text } });
        Ok(Self {
            config: config.clone(),
            loaded,
            tokenizer,
            dropped,
            taps,
            halves: corpus.halves,
            plans,
            provenance,
            stop: stop.clone(),
        })
    }

    /// The taps, ascending, with the width of each.
    #[must_use]
    pub fn taps(&self) -> &[(TapPoint, usize)] {
        &self.taps
    }

    /// The type whose values the vectors have.
    #[must_use]
    pub fn dtype(&self) -> StoreDtype {
        self.config.dtype
    }

    /// The number of buckets of `split`.
    #[must_use]
    pub fn n_buckets(&self, split: Split) -> usize {
        self.plans[split as usize].len()
    }

    /// The number of vectors of each tap of `split`.
    #[must_use]
    pub fn n_vectors(&self, split: Split) -> u64 {
        self.plans[split as usize].iter().map(|bucket| bucket.n_vectors as u64).sum()
    }

    /// Bytes of the largest training bucket in memory.
    #[must_use]
    pub fn bucket_bytes(&self) -> u64 {
        let most = self.plans[0].iter().map(|bucket| bucket.n_vectors).max().unwrap_or(0);
        let values: usize = self.taps.iter().map(|(_, width)| width).sum();
        most as u64 * values as u64 * size_of::<f32>() as u64
    }

    /// Tokens that bucket `index` of `split` takes through the model.
    ///
    /// # Errors
    /// If there is no such bucket.
    pub fn tokens(&self, split: Split, index: usize) -> Result<u64> {
        Ok((self.bucket(split, index)?.sequences.len() * self.config.sequence_length) as u64)
    }

    /// What was harvested from what, for provenance and to tell runs apart.
    #[must_use]
    pub fn provenance(&self) -> &Value {
        &self.provenance
    }

    /// What weights trained on these vectors should say about them.
    #[must_use]
    pub fn metadata(&self) -> SaeMetadata {
        SaeMetadata {
            model_name: Some(self.loaded.provenance.name.clone()),
            context_size: Some(self.config.sequence_length),
            prepend_bos: Some(self.tokenizer.bos.is_some()),
            ..SaeMetadata::default()
        }
    }

    fn bucket(&self, split: Split, index: usize) -> Result<&Bucket> {
        let buckets = &self.plans[split as usize];
        buckets
            .get(index)
            .with_context(|| format!("there are {} {} buckets, no {index}", buckets.len(), split.folder()))
    }

    /// The vectors of bucket `index` of `split` at every tap, `[n, width]` each, in their shuffled order. `bar` counts tokens.
    ///
    /// # Errors
    /// If the model fails or gives a value that `dtype` cannot hold, or [`Stopped`].
    pub fn vectors(&self, split: Split, index: usize, bar: &ProgressBar) -> Result<Vec<Vec<f32>>> {
        let bucket = self.bucket(split, index)?;
        let tokens = &self.halves[split as usize];
        let keep = Keep { tokenizer: &self.tokenizer, dropped: &self.dropped };
        let layout = plan::layout(tokens, keep, bucket, self.config.seed, split, index);
        let mut places = vec![0u32; layout.order.len()];
        for (place, &from) in (0u32..).zip(&layout.order) {
            places[from as usize] = place;
        }
        let dtype = self.config.dtype;
        let mut vectors: Vec<Vec<f32>> =
            self.taps.iter().map(|(_, width)| vec![0f32; bucket.n_vectors * width]).collect();
        let feed = Feed { model: &self.loaded.model, tokens, keep, taps: &self.taps };
        let (mut bytes, mut values, mut done) = (Vec::new(), Vec::new(), 0);
        for first in bucket.sequences.clone().step_by(self.config.batch) {
            if self.stop.is_raised() {
                return Err(Stopped.into());
            }
            let end = (first + self.config.batch).min(bucket.sequences.end);
            let mut kept = 0;
            feed.run(first..end, &mut |tap, value, rows| {
                let (point, width) = self.taps[tap];
                bytes.clear();
                spool::encode(value, rows, dtype, &mut bytes)
                    .with_context(|| format!("{point}, {} sequences {first}..{end}", split.folder()))?;
                values.resize(rows.len() * width, 0.0);
                store::decode(dtype, &bytes, &mut values);
                for (row, &place) in values.chunks_exact(width).zip(&places[done..]) {
                    let start = place as usize * width;
                    vectors[tap][start..start + width].copy_from_slice(row);
                }
                kept = rows.len();
                Ok(())
            })?;
            done += kept;
            bar.inc(((end - first) * self.config.sequence_length) as u64);
        }
        Ok(vectors)
    }
}
