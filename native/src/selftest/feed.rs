//! Judging how a device is fed: vectors of every type, from both places, come out as the host makes them; and much comes back whole.

use std::sync::Arc;

use anyhow::{Result, ensure};
use shared::RowScaling;
use shared::config::harvest::StoreDtype;
use shared::loss::row_moments;

use super::cases::Noise;
use crate::cuda::feed::{Feed, Gathering, Placement, TapAt};
use crate::cuda::{Buffer, Device};
use crate::store::decode;

/// Values of 16 bits there are.
const HALVES: usize = 1 << 16;
/// Bytes that a card downloads in several steps, and a few more.
const MUCH: usize = (80 << 20) + 12;

type Shared = Arc<dyn Device + Send + Sync>;

/// Feeds `device`; returns how many values were compared.
///
/// # Errors
/// If a value is another than the host's, or the device fails.
pub fn judge(device: &Shared) -> Result<usize> {
    let mut compared = 0;
    for placement in [Placement::Device, Placement::Host] {
        for element in [StoreDtype::F32, StoreDtype::Bf16, StoreDtype::F16] {
            for width in [HALVES / 64, HALVES / 64 - 1] {
                for rows in [RowScaling::None, RowScaling::LAYER_NORM] {
                    compared += gathered(device, placement, element, width, rows)?;
                }
            }
        }
    }
    Ok(compared + downloaded(device)?)
}

/// Values of `element`: every one there is, of those with 16 bits.
fn raw(element: StoreDtype) -> Vec<u8> {
    match element {
        StoreDtype::F32 => bytemuck::cast_slice(&Noise(31).vector(HALVES, 40.0)).to_vec(),
        StoreDtype::Bf16 | StoreDtype::F16 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
    }
}

/// Gathers rows of `width`, backwards, in two parts.
fn gathered(
    device: &Shared,
    placement: Placement,
    element: StoreDtype,
    width: usize,
    rows: RowScaling,
) -> Result<usize> {
    let (feed, inverse) = (Feed::new(device, placement), 0.3f32);
    let n_rows = HALVES / width;
    let raw = &raw(element)[..n_rows * width * element.size()];
    let mut values = vec![0.0; n_rows * width];
    decode(element, raw, &mut values);
    let undo: Vec<f64> = values
        .chunks_exact(width)
        .map(|row| rows.undo(row))
        .flat_map(|undo| [undo.scale, undo.shift])
        .collect();

    let mut filling = feed.filling();
    let mut put = |bytes: &[u8]| {
        let mut memory = filling.room(bytes.len())?;
        memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Ok::<_, anyhow::Error>(filling.put(memory, bytes.len(), |_| ())?.0)
    };
    let (there, own) = (put(raw)?, put(bytemuck::cast_slice(&undo))?);
    filling.arrive()?;
    drop(filling);

    let examples: Vec<u32> = (0..u32::try_from(n_rows)?).rev().collect();
    let tap = TapAt::new(there.at(), if rows.is_none() { 0 } else { own.at() }, inverse);
    let eps = if let RowScaling::Standardise { eps } = rows { eps } else { 0.0 };
    let widths = [width, width];
    let gathering = Gathering::new(&feed, (&[tap], None), (n_rows, widths), (element, eps), &examples)?;
    let batch = feed.batch(n_rows, widths, false)?;
    let part = n_rows / 3;
    gathering.gather(&batch, 0, 0, part)?;
    gathering.gather(&batch, part, part, n_rows - part)?;

    let mut wanted = values.clone();
    for (out, row) in wanted.chunks_exact_mut(width).zip(values.chunks_exact(width).rev()) {
        out.copy_from_slice(row);
        if !rows.is_none() {
            rows.apply(row, out);
        }
        out.iter_mut().for_each(|v| *v *= inverse);
    }
    let what = format!("{} of rows of {width} from {placement:?}, {rows:?}", element.safetensors_name());
    let found = batch.rows()?;
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    for (at, (&found, &wanted)) in found.iter().zip(&wanted).enumerate() {
        ensure!(same(found, wanted), "{what}: value {at} is {found}, and should be {wanted}");
    }
    for (row, (found, values)) in batch.moments()?.iter().zip(wanted.chunks_exact(width)).enumerate() {
        for (found, wanted) in found.iter().zip(row_moments(values)) {
            let same = *found == wanted || found.is_nan() && wanted.is_nan();
            ensure!(same, "{what}: a sum of row {row} is {found}, and should be {wanted}");
        }
    }
    Ok(found.len())
}

/// Brings much to the device and back.
fn downloaded(device: &Shared) -> Result<usize> {
    let mut state = 1u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    let sent: Vec<u32> = (0..MUCH / size_of::<u32>()).map(|_| value()).collect();
    let buffer = Buffer::of(device, &sent)?;
    let back = buffer.read::<u32>(sent.len())?;
    let differs = sent.iter().zip(&back).position(|(sent, back)| sent != back);
    ensure!(differs.is_none(), "value {differs:?} of {} came back as another", sent.len());
    Ok(sent.len())
}
