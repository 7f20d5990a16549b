//! Maps and ribbons as a few SVG paths, so that thousands of cells cost a handful of elements.

use shared::pack::flow::FlowLatents;

use super::flow::Flow;
use super::shade::{CAP, FLOOR, strength};

/// Strengths of the tint that are told apart.
pub const LEVELS: usize = 10;
/// Width of a layer's column in the picture of ribbons.
pub const COLUMN: f64 = 40.0;
/// Height of that picture.
pub const HEIGHT: f64 = 320.0;
/// Width of a latent's block in its column.
const BLOCK: f64 = 9.0;
/// Space between blocks of a column.
const GAP: f64 = 3.0;
/// Transitions below this cosine are not drawn.
const LEAST_COSINE: f32 = 0.2;

/// The opacity of a level.
#[must_use]
pub fn opacity(level: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "ten levels")]
    let share = level as f64 / (LEVELS - 1) as f64;
    FLOOR + (CAP - FLOOR) * share
}

/// The level of an activation; `None` where nothing is active.
fn level(value: f32, largest: f32) -> Option<usize> {
    let strength = strength(value, largest);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "ten levels"
    )]
    let level = ((strength - FLOOR) / (CAP - FLOOR) * (LEVELS - 1) as f64).round() as usize;
    (strength > 0.0).then_some(level.min(LEVELS - 1))
}

/// Cells `[rows · columns]` as one path a level, in units of cells, the first row on top; equal neighbours are one shape.
#[must_use]
pub fn cells(values: &[f32], columns: usize, largest: f32) -> [String; LEVELS] {
    use std::fmt::Write;
    let mut paths: [String; LEVELS] = Default::default();
    for (y, row) in values.chunks(columns.max(1)).enumerate() {
        let mut x = 0;
        while x < row.len() {
            let here = level(row[x], largest);
            let run = row[x..].iter().take_while(|&&value| level(value, largest) == here).count();
            if let Some(here) = here {
                // Writing into a string cannot fail.
                let _ = write!(paths[here], "M{x} {y}h{run}v1h-{run}z");
            }
            x += run;
        }
    }
    paths
}

/// A latent at a layer in the picture of ribbons.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// The latent.
    pub latent: u32,
    /// The layer's number.
    pub layer: usize,
    /// Its activation.
    pub value: f32,
    /// Upper left corner.
    pub x: f64,
    /// Upper left corner.
    pub y: f64,
    /// Its height, in proportion to the activation.
    pub height: f64,
}

/// The latents of a token through the layers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ribbons {
    blocks: Vec<Block>,
    /// Between blocks: indices of both, and the cosine where they are of different latents.
    links: Vec<(usize, usize, Option<f32>)>,
}

impl Ribbons {
    /// The `most` strongest latents of `token` at each layer, stacked in the order of the layers they are centred on, with
    /// ribbons between equal latents of neighbouring layers and threads where the corpus has transitions.
    #[must_use]
    pub fn new(flow: &Flow, token: usize, latents: Option<&FlowLatents>, most: usize) -> Self {
        let mut order: Vec<u32> = flow.of_token(token, usize::MAX).iter().map(|row| row.latent).collect();
        let layers: Vec<Vec<(u32, f32)>> = (0..flow.n_layers())
            .map(|layer| {
                let mut strongest = flow.strongest(layer, token);
                strongest.truncate(most);
                strongest
            })
            .collect();
        order.retain(|latent| layers.iter().flatten().any(|shown| shown.0 == *latent));
        let sum = |layer: &Vec<(u32, f32)>| layer.iter().map(|shown| f64::from(shown.1)).sum::<f64>();
        let tallest = layers.iter().map(sum).fold(0.0, f64::max);
        #[expect(clippy::cast_precision_loss, reason = "a few latents")]
        let scale = (HEIGHT - GAP * most as f64) / tallest.max(f64::MIN_POSITIVE);
        let mut made = Self::default();
        for (layer, mut shown) in layers.into_iter().enumerate() {
            shown.sort_by_key(|(latent, _)| order.iter().position(|other| other == latent));
            #[expect(clippy::cast_precision_loss, reason = "a few hundred layers")]
            let x = layer as f64 * COLUMN + (COLUMN - BLOCK) / 2.0;
            let heights = shown.iter().map(|(_, value)| (f64::from(*value) * scale).max(1.5));
            #[expect(clippy::cast_precision_loss, reason = "a few latents")]
            let all = heights.clone().sum::<f64>() + GAP * shown.len().saturating_sub(1) as f64;
            let mut y = ((HEIGHT - all) / 2.0).max(0.0);
            for (&(latent, value), height) in shown.iter().zip(heights) {
                made.blocks.push(Block { latent, layer, value, x, y, height });
                y += height + GAP;
            }
        }
        made.link(flow.n_layers(), latents);
        made
    }

    fn link(&mut self, n_layers: usize, latents: Option<&FlowLatents>) {
        for (from, block) in self.blocks.iter().enumerate() {
            let place = latents.and_then(|latents| latents.find(block.latent));
            for (to, next) in self.blocks.iter().enumerate() {
                if next.layer != block.layer + 1 {
                    continue;
                }
                if next.latent == block.latent {
                    self.links.push((from, to, None));
                } else if let (Some(latents), Some(place)) = (latents, place) {
                    let all = latents.transitions(place, block.layer, n_layers);
                    let found = all.iter().find(|t| t.to == next.latent && t.cosine >= LEAST_COSINE);
                    self.links.extend(found.map(|t| (from, to, Some(t.cosine))));
                }
            }
        }
    }

    /// The blocks, layer by layer, from the top.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The block that is nearest to a point, if the point is in its column.
    #[must_use]
    pub fn nearest(&self, x: f64, y: f64) -> Option<&Block> {
        let inside = |block: &&Block| (x - block.x - BLOCK / 2.0).abs() <= COLUMN / 2.0;
        let distance = |block: &Block| (y - y.clamp(block.y, block.y + block.height)).abs();
        self.blocks.iter().filter(inside).min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }

    /// The blocks as a path: of one latent, or of all.
    #[must_use]
    pub fn block_path(&self, latent: Option<u32>) -> String {
        let shown = self.blocks.iter().filter(|block| latent.is_none_or(|latent| block.latent == latent));
        shown.map(|b| format!("M{:.1} {:.1}h{BLOCK}v{:.1}h-{BLOCK}z", b.x, b.y, b.height)).collect()
    }

    /// Ribbons between equal latents as a path: of one latent, or of all.
    #[must_use]
    pub fn same_path(&self, latent: Option<u32>) -> String {
        let shown = |from: &Block| latent.is_none_or(|latent| from.latent == latent);
        let links =
            self.links.iter().filter(|(from, _, cosine)| cosine.is_none() && shown(&self.blocks[*from]));
        links.map(|&(from, to, _)| band(&self.blocks[from], &self.blocks[to])).collect()
    }

    /// Threads between different latents as a path, as thick as the cosine: those that begin or end at one latent, or all.
    #[must_use]
    pub fn other_path(&self, latent: Option<u32>) -> String {
        let touches = |from: &Block, to: &Block| latent.is_none_or(|l| from.latent == l || to.latent == l);
        let links = self
            .links
            .iter()
            .filter_map(|&(from, to, cosine)| Some((&self.blocks[from], &self.blocks[to], cosine?)));
        let links = links.filter(|(from, to, _)| touches(from, to));
        links
            .map(|(from, to, cosine)| {
                let most = 5.0 * f64::from(cosine);
                let thin = |block: &Block| {
                    let height = block.height.min(most);
                    Block { y: block.y + (block.height - height) / 2.0, height, ..block.clone() }
                };
                band(&thin(from), &thin(to))
            })
            .collect()
    }
}

/// A band from the right side of a block to the left side of another.
fn band(from: &Block, to: &Block) -> String {
    let (x0, x1) = (from.x + BLOCK, to.x);
    let middle = f64::midpoint(x0, x1);
    let (y0, y1) = (from.y, to.y);
    let (b0, b1) = (y0 + from.height, y1 + to.height);
    format!(
        "M{x0:.1} {y0:.1}C{middle:.1} {y0:.1} {middle:.1} {y1:.1} {x1:.1} {y1:.1}V{b1:.1}C{middle:.1} {b1:.1} {middle:.1} {b0:.1} {x0:.1} {b0:.1}z"
    )
}

#[cfg(test)]
mod tests {
    use shared::pack::flow::Transition;

    use super::super::flow::tests::flow;
    use super::*;

    #[test]
    fn equal_neighbours_are_one_shape() {
        let paths = cells(&[0.0, 4.0, 4.0, 4.0, 0.0, 0.0], 3, 4.0);
        assert_eq!(paths[LEVELS - 1], "M1 0h2v1h-2zM0 1h1v1h-1z");
        assert!(paths[..LEVELS - 1].iter().all(String::is_empty));
        let weak = cells(&[1e-9, 4.0], 2, 4.0);
        assert_eq!(weak[0], "M0 0h1v1h-1z", "what is active is seen");
        assert!((opacity(0) - FLOOR).abs() < 1e-12 && (opacity(LEVELS - 1) - CAP).abs() < 1e-12);
        assert!(cells(&[], 0, 1.0).iter().all(String::is_empty));
    }

    #[test]
    fn ribbons_join_equal_latents_and_threads_what_goes_together() {
        let flow = flow();
        let mut latents = FlowLatents { latents: vec![1, 7], ..FlowLatents::default() };
        let to = |to, cosine| vec![Transition { to, count: 3, cosine, share: 0.5 }];
        // From latent 1: to 7 at layer 1, and to 7 again, but too weakly, at layer 2.
        latents.transitions = vec![to(7, 0.5), to(7, 0.1), vec![], vec![]];
        let ribbons = Ribbons::new(&flow, 1, Some(&latents), 9);
        let shown: Vec<_> = ribbons.blocks().iter().map(|b| (b.layer, b.latent)).collect();
        assert_eq!(shown, [(0, 4), (0, 1), (1, 1), (1, 7), (2, 7)]);
        assert_eq!(ribbons.links, [(1, 2, None), (1, 3, Some(0.5)), (3, 4, None)]);
        let [tall, low] = [3, 4].map(|i| ribbons.blocks()[i].height);
        assert!((tall / low - 16.0).abs() < 1e-9, "heights follow activations");
        assert!(ribbons.blocks().iter().all(|b| b.y >= 0.0 && b.y + b.height <= HEIGHT));
        let count = |path: &str| path.matches('M').count();
        assert_eq!((count(&ribbons.same_path(None)), count(&ribbons.same_path(Some(7)))), (2, 1));
        assert_eq!((count(&ribbons.other_path(None)), count(&ribbons.other_path(Some(4)))), (1, 0));
        assert_eq!(count(&ribbons.block_path(Some(1))), 2);
        let at = ribbons.nearest(1.5 * COLUMN, HEIGHT).map(|b| (b.layer, b.latent));
        assert_eq!((at, ribbons.nearest(9.0 * COLUMN, 0.0)), (Some((1, 7)), None));
        assert_eq!(Ribbons::new(&flow, 9, None, 3), Ribbons::default());
    }
}
