//! `flow/latents.safetensors`: at which layers the described latents are active, and what goes with them at the next.

use half::f16;

use super::{FLOW_LATENTS, FlowInfo, TRANSITIONS};
use crate::pack::error::{PackError, check};
use crate::pack::features::{check_offsets, offsets};
use crate::pack::tensors::{Reader, Writer};

/// What is known about the described latents over the corpus.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FlowLatents {
    /// The described latents, ascending, `[m]`.
    pub latents: Vec<u32>,
    /// Activation summed over the corpus, `[m, L]`.
    pub totals: Vec<f32>,
    /// Tokens where active, `[m, L]`.
    pub counts: Vec<u32>,
    /// For each latent and each layer but the last, latents of the next layer on the same token, most alike first;
    /// `[m, L − 1]`, each at most [`TRANSITIONS`]. A correlation, not a cause.
    pub transitions: Vec<Vec<Transition>>,
}

/// How latent j at a layer and latent k at the next go together, over tokens t with activations f and g.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transition {
    /// Latent k.
    pub to: u32,
    /// Tokens where both are active.
    pub count: u32,
    /// `Σ f g / √(Σ f² Σ g²)`, as a half-precision number: 1 where both are always active together, in proportion.
    pub cosine: f32,
    /// `Σ f g` over its sum for all latents of the next layer, as a half-precision number: the share of the
    /// activity-weighted count of transitions from j that lead to k.
    pub share: f32,
}

impl FlowLatents {
    /// The place of `latent` among the described ones.
    #[must_use]
    pub fn find(&self, latent: u32) -> Option<usize> {
        self.latents.binary_search(&latent).ok()
    }

    /// What goes at layer number `layer + 1` with the latent at place `place` at layer `layer`.
    #[must_use]
    pub fn transitions(&self, place: usize, layer: usize, n_layers: usize) -> &[Transition] {
        let gaps = n_layers.saturating_sub(1);
        let row = (layer < gaps).then(|| self.transitions.get(place * gaps + layer)).flatten();
        row.map_or(&[], Vec::as_slice)
    }

    /// Reads the file of the section `info` of a dictionary of `n_latents`.
    ///
    /// # Errors
    /// If a tensor is missing, stray or misshapen, or an index or value is out of range.
    pub fn read(info: &FlowInfo, n_latents: usize, bytes: &[u8]) -> Result<Self, PackError> {
        let (m, n_layers) = (info.n_described, info.layers.len());
        let names =
            ["latents", "totals", "counts", "offsets", "to", "transition_counts", "cosines", "shares"];
        let reader = Reader::new(FLOW_LATENTS, bytes, &names)?;
        let rows = m * (n_layers - 1);
        let starts: Vec<u32> = reader.values("offsets", &[rows + 1])?;
        let n = reader.shape("to")?.first().copied().unwrap_or(0);
        check_offsets(FLOW_LATENTS, "offsets", &starts, n)?;
        let to: Vec<u32> = reader.values("to", &[n])?;
        let counts: Vec<u32> = reader.values("transition_counts", &[n])?;
        let cosines: Vec<f16> = reader.values("cosines", &[n])?;
        let shares: Vec<f16> = reader.values("shares", &[n])?;
        let transition = |i: usize| Transition {
            to: to[i],
            count: counts[i],
            cosine: cosines[i].to_f32(),
            share: shares[i].to_f32(),
        };
        let row = |w: &[u32]| (w[0] as usize..w[1] as usize).map(transition).collect();
        let read = Self {
            latents: reader.values("latents", &[m])?,
            totals: reader.values("totals", &[m, n_layers])?,
            counts: reader.values("counts", &[m, n_layers])?,
            transitions: starts.windows(2).map(row).collect(),
        };
        read.validate(n_layers, n_latents)?;
        Ok(read)
    }

    /// The bytes of the file, for `n_layers` layers of a dictionary of `n_latents`.
    ///
    /// # Errors
    /// If lengths differ, or an index or value is out of range.
    pub fn write(&self, n_layers: usize, n_latents: usize) -> Result<Vec<u8>, PackError> {
        self.validate(n_layers, n_latents)?;
        let (m, all) = (self.latents.len(), || self.transitions.iter().flatten());
        let n = all().count();
        let starts = offsets(FLOW_LATENTS, self.transitions.iter().map(Vec::len))?;
        let mut writer = Writer::new(FLOW_LATENTS);
        writer.add("latents", &[m], self.latents.iter().copied())?;
        writer.add("totals", &[m, n_layers], self.totals.iter().copied())?;
        writer.add("counts", &[m, n_layers], self.counts.iter().copied())?;
        writer.add("offsets", &[starts.len()], starts)?;
        writer.add("to", &[n], all().map(|t| t.to))?;
        writer.add("transition_counts", &[n], all().map(|t| t.count))?;
        writer.add("cosines", &[n], all().map(|t| f16::from_f32(t.cosine)))?;
        writer.add("shares", &[n], all().map(|t| f16::from_f32(t.share)))?;
        writer.finish()
    }

    fn validate(&self, n_layers: usize, n_latents: usize) -> Result<(), PackError> {
        let (m, file) = (self.latents.len(), FLOW_LATENTS);
        let ascending = self.latents.windows(2).all(|w| w[0] < w[1]);
        let inside = self.latents.last().is_none_or(|&latent| (latent as usize) < n_latents);
        check(ascending && inside, file, "latents", format!("ascending, below {n_latents}"), "others")?;
        let gaps = n_layers.saturating_sub(1);
        for (name, found, wanted) in [
            ("totals", self.totals.len(), m * n_layers),
            ("counts", self.counts.len(), m * n_layers),
            ("offsets", self.transitions.len(), m * gaps),
        ] {
            check(found == wanted, file, name, wanted.to_string(), found)?;
        }
        let bad = self.totals.iter().find(|v| !(**v >= 0.0 && v.is_finite()));
        check(bad.is_none(), file, "totals", "sums of at least 0", format!("{bad:?}"))?;
        let longest = self.transitions.iter().map(Vec::len).max().unwrap_or(0);
        check(longest <= TRANSITIONS, file, "offsets", format!("rows of at most {TRANSITIONS}"), longest)?;
        let within = |t: &Transition| {
            (t.to as usize) < n_latents && [t.cosine, t.share].iter().all(|v| (0.0..=1.0).contains(v))
        };
        let stray = self.transitions.iter().flatten().find(|t| !within(t));
        let wanted = format!("latents below {n_latents}, shares and cosines in 0..=1");
        check(stray.is_none(), file, "transitions", wanted, format!("{stray:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::tests::info;
    use super::*;

    fn latents() -> FlowLatents {
        let transition = |to, cosine| Transition { to, count: 3, cosine, share: 0.25 };
        FlowLatents {
            latents: vec![0, 2, 5, 7, 19],
            totals: vec![0.5; 10],
            counts: (0..10).collect(),
            transitions: vec![
                vec![transition(3, 1.0), transition(19, 0.5)],
                vec![],
                vec![],
                vec![transition(0, 0.0)],
                vec![],
            ],
        }
    }

    #[test]
    fn round_trip() {
        let (info, latents) = (info(&mut BTreeMap::new()), latents());
        let bytes = latents.write(2, 20).unwrap();
        assert_eq!(FlowLatents::read(&info, 20, &bytes).unwrap(), latents);
        assert_eq!((latents.find(7), latents.find(6)), (Some(3), None));
        assert_eq!(latents.transitions(0, 0, 2).len(), 2);
        assert!(latents.transitions(0, 1, 2).is_empty() && latents.transitions(9, 0, 2).is_empty());
        assert!(FlowLatents::read(&info, 19, &bytes).is_err());
        assert!(FlowLatents::read(&FlowInfo { n_described: 4, ..info }, 20, &bytes).is_err());
    }

    #[test]
    fn each_rule_is_enforced() {
        type Breaks = fn(&mut FlowLatents);
        let broken: [(&str, Breaks); 9] = [
            ("latents", |l| l.latents.swap(0, 1)),
            ("latents", |l| l.latents[4] = 20),
            ("totals", |l| l.totals[0] = -1.0),
            ("totals", |l| l.totals.truncate(1)),
            ("counts", |l| l.counts.truncate(1)),
            ("offsets", |l| drop(l.transitions.pop())),
            ("offsets", |l| l.transitions[1] = vec![l.transitions[0][0]; TRANSITIONS + 1]),
            ("transitions", |l| l.transitions[0][0].to = 20),
            ("transitions", |l| l.transitions[0][0].cosine = 1.5),
        ];
        for (field, breaks) in broken {
            let mut l = latents();
            breaks(&mut l);
            let error = l.write(2, 20).expect_err(field).to_string();
            assert!(error.contains(field), "{error} does not name {field}");
        }
    }

    #[test]
    fn hostile_bytes_are_errors() {
        let (info, bytes) = (info(&mut BTreeMap::new()), latents().write(2, 20).unwrap());
        for end in 0..bytes.len() {
            assert!(FlowLatents::read(&info, 20, &bytes[..end]).is_err(), "cut at {end}");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x81;
            if let Ok(read) = FlowLatents::read(&info, 20, &damaged) {
                assert!(read.write(2, 20).is_ok(), "byte {at}");
            }
        }
    }
}
