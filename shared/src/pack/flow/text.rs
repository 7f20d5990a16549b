//! `flow/NN.safetensors`: the active latents of every token of a text at every layer, how much of each vector they miss,
//! and what removing some of them changes later in the language model.

use half::f16;

use super::{CHANGES, FlowEntry};
use crate::codes::{Codes, CodesBuilder};
use crate::pack::error::{PackError, check};
use crate::pack::features::{check_offsets, offsets};
use crate::pack::tensors::{Reader, Writer};

/// Latents are stored in two bytes where the dictionary is no wider.
const NARROW: usize = 1 << 16;

/// What a text's latents are at every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowText {
    /// Token ids, `[t]`.
    pub tokens: Vec<u32>,
    /// Tokens that are not encoded at a layer: special ones everywhere, and vectors beyond the layer's norm, `[L, t]`.
    pub skip: Vec<bool>,
    /// Active latents and activations, a row each `[L · t]`, layer by layer; empty rows where skipped.
    pub codes: Codes,
    /// `‖x − x̂‖² / ‖x − mean‖²` with the mean of the layer over the corpus, `[L, t]`; 0 where skipped.
    pub errors: Vec<f32>,
    /// What was tried by removing.
    pub effects: Vec<Effect>,
}

/// A latent removed at a layer on every token of the text, and what changes behind.
#[derive(Debug, Clone, PartialEq)]
pub struct Effect {
    /// The latent.
    pub latent: u32,
    /// Number of the layer where its direction was taken out.
    pub layer: u16,
    /// Its activation there, summed over the tokens.
    pub removed: f32,
    /// The latents that change most, at most [`CHANGES`] a later layer, layers ascending.
    pub changes: Vec<Change>,
}

/// How a latent at a later layer changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Number of the layer.
    pub layer: u16,
    /// The latent.
    pub latent: u32,
    /// Its activation there, summed over the tokens.
    pub before: f32,
    /// The same in the model that ran on without the removed latent.
    pub after: f32,
}

/// An activation as the file keeps it: the nearest half-precision number (ties to even), but never zero or infinite, so
/// that what is active stays active.
#[must_use]
pub fn stored(value: f32) -> f32 {
    f16::from_f32(value).clamp(f16::from_bits(1), f16::MAX).to_f32()
}

const TENSORS: [&str; 14] = [
    "tokens",
    "skip",
    "counts",
    "latents",
    "values",
    "errors",
    "effect_latents",
    "effect_layers",
    "effect_removed",
    "change_offsets",
    "change_layers",
    "change_latents",
    "change_before",
    "change_after",
];

impl FlowText {
    /// Reads the numbers of `entry`, for `n_layers` layers of a dictionary of `n_latents`.
    ///
    /// # Errors
    /// If a tensor is missing, stray or misshapen, or an index or value is out of range.
    pub fn read(
        entry: &FlowEntry,
        n_layers: usize,
        n_latents: usize,
        bytes: &[u8],
    ) -> Result<Self, PackError> {
        let (file, t) = (&entry.file[..], entry.words.len());
        let reader = Reader::new(file, bytes, &TENSORS)?;
        let skip: Vec<u8> = reader.values("skip", &[n_layers, t])?;
        let stray = skip.iter().find(|&&s| s > 1);
        check(stray.is_none(), file, "skip", "0 or 1", format!("{stray:?}"))?;
        let text = Self {
            tokens: reader.values("tokens", &[t])?,
            skip: skip.into_iter().map(|s| s == 1).collect(),
            codes: read_codes(&reader, file, [n_layers, t], n_latents)?,
            errors: reader.values("errors", &[n_layers, t])?,
            effects: read_effects(&reader, file)?,
        };
        text.validate(file, n_layers, n_latents)?;
        Ok(text)
    }

    /// The bytes of the file, called `file` in errors. Activations come back as [`stored`].
    ///
    /// # Errors
    /// If lengths differ, or an index or value is out of range.
    pub fn write(&self, file: &str) -> Result<Vec<u8>, PackError> {
        let (t, n_latents) = (self.tokens.len(), self.codes.n_latents());
        let n_layers = self.codes.n_rows() / t.max(1);
        self.validate(file, n_layers, n_latents)?;
        let rows = |codes: &Codes| codes.iter().map(|row| row.0.len()).collect::<Vec<_>>();
        let counts: Vec<u32> = rows(&self.codes).into_iter().map(narrow).collect();
        let latents = self.codes.iter().flat_map(|row| row.0.iter().copied());
        let values = self.codes.iter().flat_map(|row| row.1.iter().map(|&v| f16::from_f32(stored(v))));
        let n = self.codes.n_active();
        let mut writer = Writer::new(file);
        writer.add("tokens", &[t], self.tokens.iter().copied())?;
        writer.add("skip", &[n_layers, t], self.skip.iter().map(|&s| u8::from(s)))?;
        writer.add("counts", &[n_layers, t], counts)?;
        if n_latents <= NARROW {
            #[expect(clippy::cast_possible_truncation, reason = "below 2^16")]
            writer.add("latents", &[n], latents.map(|latent| latent as u16))?;
        } else {
            writer.add("latents", &[n], latents)?;
        }
        writer.add("values", &[n], values)?;
        writer.add("errors", &[n_layers, t], self.errors.iter().copied())?;
        let changes = || self.effects.iter().flat_map(|e| &e.changes);
        let (e, c) = (self.effects.len(), changes().count());
        writer.add("effect_latents", &[e], self.effects.iter().map(|e| e.latent))?;
        writer.add("effect_layers", &[e], self.effects.iter().map(|e| e.layer))?;
        writer.add("effect_removed", &[e], self.effects.iter().map(|e| e.removed))?;
        writer.add(
            "change_offsets",
            &[e + 1],
            offsets(file, self.effects.iter().map(|e| e.changes.len()))?,
        )?;
        writer.add("change_layers", &[c], changes().map(|c| c.layer))?;
        writer.add("change_latents", &[c], changes().map(|c| c.latent))?;
        writer.add("change_before", &[c], changes().map(|c| c.before))?;
        writer.add("change_after", &[c], changes().map(|c| c.after))?;
        writer.finish()
    }

    fn validate(&self, file: &str, n_layers: usize, n_latents: usize) -> Result<(), PackError> {
        let t = self.tokens.len();
        for (name, found) in
            [("skip", self.skip.len()), ("codes", self.codes.n_rows()), ("errors", self.errors.len())]
        {
            check(found == n_layers * t, file, name, format!("{n_layers} layers of {t} tokens"), found)?;
        }
        let stray = self.codes.iter().zip(&self.skip).position(|(row, &skip)| skip && !row.0.is_empty());
        check(stray.is_none(), file, "counts", "0 where skipped", format!("{stray:?}"))?;
        let bad = self.codes.iter().flat_map(|row| row.1).find(|v| !(**v > 0.0 && v.is_finite()));
        check(bad.is_none(), file, "values", "activations above 0", format!("{bad:?}"))?;
        let bad = self.errors.iter().find(|v| !(**v >= 0.0 && v.is_finite()));
        check(bad.is_none(), file, "errors", "values of at least 0", format!("{bad:?}"))?;
        self.effects.iter().try_for_each(|effect| effect.validate(file, n_layers, n_latents))
    }
}

impl Effect {
    fn validate(&self, file: &str, n_layers: usize, n_latents: usize) -> Result<(), PackError> {
        let inside = |latent: u32, layer: u16| (latent as usize) < n_latents && usize::from(layer) < n_layers;
        let wanted = || format!("latents below {n_latents} at layers below {n_layers}");
        let found = format!("{} at {}", self.latent, self.layer);
        check(inside(self.latent, self.layer), file, "effects", wanted(), found)?;
        let stray = self.changes.iter().find(|c| !inside(c.latent, c.layer) || c.layer <= self.layer);
        check(stray.is_none(), file, "changes", format!("{}, behind", wanted()), format!("{stray:?}"))?;
        let sorted = self.changes.is_sorted_by_key(|change| change.layer);
        let most = self.changes.chunk_by(|a, b| a.layer == b.layer).map(<[Change]>::len).max().unwrap_or(0);
        let field = "change_layers";
        check(
            sorted && most <= CHANGES,
            file,
            field,
            format!("ascending, each at most {CHANGES} times"),
            most,
        )?;
        let mut amounts = self.changes.iter().flat_map(|c| [c.before, c.after]).chain([self.removed]);
        let bad = amounts.find(|v| !(*v >= 0.0 && v.is_finite()));
        check(bad.is_none(), file, "effects", "sums of at least 0", format!("{bad:?}"))
    }
}

fn narrow(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn read_codes(
    reader: &Reader<'_>,
    file: &str,
    shape: [usize; 2],
    n_latents: usize,
) -> Result<Codes, PackError> {
    let counts: Vec<u32> = reader.values("counts", &shape)?;
    let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
    let n = reader.shape("values")?.first().copied().unwrap_or(0);
    check(total == n as u64, file, "counts", format!("a sum of {n}"), total)?;
    let latents: Vec<u32> = if n_latents <= NARROW {
        reader.values::<u16>("latents", &[n])?.into_iter().map(u32::from).collect()
    } else {
        reader.values("latents", &[n])?
    };
    let values: Vec<f16> = reader.values("values", &[n])?;
    let mut entries = latents.into_iter().zip(values);
    let mut builder = CodesBuilder::new(n_latents);
    for count in counts {
        entries
            .by_ref()
            .take(count as usize)
            .for_each(|(latent, value)| builder.push(latent, value.to_f32()));
        builder.end_row()?;
    }
    Ok(builder.finish())
}

fn read_effects(reader: &Reader<'_>, file: &str) -> Result<Vec<Effect>, PackError> {
    let e = reader.shape("effect_latents")?.first().copied().unwrap_or(0);
    let c = reader.shape("change_latents")?.first().copied().unwrap_or(0);
    let latents: Vec<u32> = reader.values("effect_latents", &[e])?;
    let layers: Vec<u16> = reader.values("effect_layers", &[e])?;
    let removed: Vec<f32> = reader.values("effect_removed", &[e])?;
    let starts: Vec<u32> = reader.values("change_offsets", &[e + 1])?;
    check_offsets(file, "change_offsets", &starts, c)?;
    let change_layers: Vec<u16> = reader.values("change_layers", &[c])?;
    let change_latents: Vec<u32> = reader.values("change_latents", &[c])?;
    let before: Vec<f32> = reader.values("change_before", &[c])?;
    let after: Vec<f32> = reader.values("change_after", &[c])?;
    let change = |i: usize| Change {
        layer: change_layers[i],
        latent: change_latents[i],
        before: before[i],
        after: after[i],
    };
    Ok((0..e)
        .map(|i| Effect {
            latent: latents[i],
            layer: layers[i],
            removed: removed[i],
            changes: (starts[i] as usize..starts[i + 1] as usize).map(change).collect(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::super::flow_text;
    use super::*;

    fn entry(t: usize) -> FlowEntry {
        FlowEntry {
            id: "a".to_owned(),
            title: String::new(),
            source: String::new(),
            file: flow_text(0),
            vectors: String::new(),
            words: vec![String::new(); t],
        }
    }

    /// Two layers of three tokens; the first token is skipped everywhere.
    fn text(n_latents: usize) -> FlowText {
        let mut builder = CodesBuilder::new(n_latents);
        let last = u32::try_from(n_latents - 1).unwrap();
        for row in [&[][..], &[(0, 1.0), (last, 0.25)], &[], &[], &[(7, 2.5)], &[(7, 0.5)]] {
            row.iter().for_each(|&(latent, value)| builder.push(latent, value));
            builder.end_row().unwrap();
        }
        let change = |latent, after| Change { layer: 1, latent, before: 3.0, after };
        FlowText {
            tokens: vec![1, 5, 6],
            skip: vec![true, false, false, true, false, false],
            codes: builder.finish(),
            errors: vec![0.0, 0.25, 1.5, 0.0, 0.125, 0.5],
            effects: vec![
                Effect { latent: 0, layer: 0, removed: 1.0, changes: vec![change(7, 2.0), change(3, 0.0)] },
                Effect { latent: 7, layer: 1, removed: 3.0, changes: vec![] },
            ],
        }
    }

    #[test]
    fn round_trip_with_latents_of_both_widths() {
        for n_latents in [20, NARROW, NARROW + 1] {
            let bytes = text(n_latents).write("f").unwrap();
            assert_eq!(FlowText::read(&entry(3), 2, n_latents, &bytes).unwrap(), text(n_latents));
            assert!(FlowText::read(&entry(2), 2, n_latents, &bytes).is_err(), "another number of tokens");
            assert!(FlowText::read(&entry(3), 3, n_latents, &bytes).is_err(), "another number of layers");
            assert!(FlowText::read(&entry(3), 2, n_latents - 1, &bytes).is_err(), "a latent out of range");
        }
    }

    #[test]
    fn what_is_active_stays_active() {
        assert_eq!((stored(1e-30), stored(1e9)), (f16::from_bits(1).to_f32(), 65504.0));
        assert_eq!(stored(0.1), f16::from_f32(0.1).to_f32());
        // Ties to even: 2049 lies between 2048 and 2050.
        assert_eq!((stored(2049.0), stored(2051.0)), (2048.0, 2052.0));
    }

    #[test]
    fn each_rule_is_enforced() {
        type Breaks = fn(&mut FlowText);
        let broken: [(&str, Breaks); 12] = [
            ("skip", |t| t.skip[1] = true),
            ("skip", |t| t.skip.truncate(1)),
            ("errors", |t| t.errors[1] = -1.0),
            ("errors", |t| t.errors[1] = f32::NAN),
            ("errors", |t| t.errors.truncate(1)),
            ("effects", |t| t.effects[0].latent = 20),
            ("effects", |t| t.effects[0].layer = 2),
            ("effects", |t| t.effects[1].removed = f32::INFINITY),
            ("changes", |t| t.effects[0].changes[0].layer = 0),
            ("changes", |t| t.effects[0].changes[1].latent = 20),
            ("effects", |t| t.effects[0].changes[1].after = -0.5),
            ("change_layers", |t| t.effects[0].changes = vec![t.effects[0].changes[0]; CHANGES + 1]),
        ];
        for (field, breaks) in broken {
            let mut t = text(20);
            breaks(&mut t);
            let error = t.write("f").expect_err(field).to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
        let mut unsorted = CodesBuilder::new(20);
        unsorted.push(1, 0.0);
        (0..6).for_each(|_| unsorted.end_row().unwrap());
        let zero = FlowText { codes: unsorted.finish(), skip: vec![false; 6], ..text(20) };
        assert!(zero.write("f").unwrap_err().to_string().contains("above 0"));
    }

    #[test]
    fn hostile_bytes_are_errors() {
        let bytes = text(20).write("f").unwrap();
        for end in (0..bytes.len()).step_by(7) {
            assert!(FlowText::read(&entry(3), 2, 20, &bytes[..end]).is_err(), "cut at {end}");
        }
        // Whatever a byte becomes, reading ends with a text that keeps the rules or with an error.
        for at in 0..bytes.len() {
            for flip in [1u8, 0x80] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                if let Ok(read) = FlowText::read(&entry(3), 2, 20, &damaged) {
                    assert!(read.write("f").is_ok(), "byte {at}");
                }
            }
        }
    }
}
