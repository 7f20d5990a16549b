//! The log of a run once more, as TensorBoard reads it, under the names SAELens 6 gives its metrics.
//!
//! An event file is a row of frames: length (u64), its masked CRC-32C, an `Event` message, its masked CRC-32C, all little-endian
//! (tensorflow/core/lib/io/record_writer.h, tensorflow/core/util/event.proto). The messages are so few and so small that
//! they are written by hand.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use crc_fast::{CrcAlgorithm, checksum};
use shared::config::train::TrainConfig;

use super::log::Line;
use crate::files::write_bytes;

/// The file beside `log.jsonl`. TensorBoard knows it by its second and third word; the number stands where a time would, so that
/// a run that is resumed goes on in the same file.
pub(crate) const FILE: &str = "events.out.tfevents.0000000000.stratascope";

/// Appends events to a file.
#[derive(Debug)]
pub(super) struct Events {
    file: File,
    path: PathBuf,
    width: usize,
    /// What SAELens calls the weight of the sparsity term.
    coefficient: Option<&'static str>,
}

impl Events {
    /// Opens the event file in `folder`, keeping what was written up to `step`.
    pub(super) fn open(folder: &Path, step: u64, config: &TrainConfig) -> Result<Self> {
        let path = folder.join(FILE);
        let before = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let mut kept = 0;
        while let Some((message, length)) = frame_at(&before[kept..])
            && step_of(message).is_some_and(|of| of <= step)
        {
            kept += length;
        }
        if kept == 0 {
            let version = [wall_time(), field(3, b"brain.Event:2")].concat();
            write_bytes(&path, &frame(&version))?;
        } else {
            write_bytes(&path, &before[..kept])?;
        }
        let file = OpenOptions::new().append(true).open(&path);
        let coefficient = match config.activation {
            activation if activation.has_norm() => Some("details/l1_coefficient"),
            activation if activation.chooses() => None,
            _ => Some("details/l0_coefficient"),
        };
        Ok(Self {
            file: file.with_context(|| format!("cannot write {}", path.display()))?,
            path,
            width: config.width,
            coefficient,
        })
    }

    /// Adds what `line` says.
    pub(super) fn write(&mut self, line: &Line) -> Result<()> {
        let mut event = wall_time();
        event.extend([0x10]);
        varint(&mut event, line.step);
        event.extend(field(5, &self.scalars(line).iter().flat_map(scalar).collect::<Vec<_>>()));
        self.file.write_all(&frame(&event)).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn scalars(&self, line: &Line) -> Vec<(&'static str, f64)> {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let (width, tokens, skipped) = (self.width as f64, line.tokens as f64, line.skipped as f64);
        let mut scalars = vec![
            ("losses/overall_loss", line.loss),
            ("losses/mse_loss", line.mse),
            ("metrics/l0", line.l0),
            ("metrics/explained_variance", 1.0 - line.fvu),
            ("sparsity/dead_features", (line.dead * width).round()),
            ("details/current_learning_rate", line.lr),
            ("details/n_training_samples", tokens),
            ("details/skipped_batches", skipped),
            ("performance/tokens_per_s", line.tokens_per_s),
            ("performance/waiting", line.waiting),
            ("performance/encoder_gflops", line.speed.encoder_gflops),
        ];
        scalars.extend(line.speed.mfu.map(|mfu| ("performance/mfu", mfu)));
        scalars.extend(self.coefficient.map(|name| (name, line.lambda)));
        scalars
    }
}

/// The field `wall_time` of an event, in seconds since 1970.
fn wall_time() -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    [&[0x09][..], &now.to_le_bytes()].concat()
}

/// A `Summary.Value`, as field 1 of a summary: tag and simple value.
fn scalar(&(tag, value): &(&'static str, f64)) -> Vec<u8> {
    #[expect(clippy::cast_possible_truncation, reason = "simple values are f32")]
    let value = (value as f32).to_le_bytes();
    field(1, &[&field(1, tag.as_bytes())[..], &[0x15], &value].concat())
}

/// A length-delimited field.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    varint(&mut out, bytes.len() as u64);
    out.extend(bytes);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn frame(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

/// CRC-32C, turned by 15 bits and shifted by a constant, so that checksums of data with checksums in them stay sound.
fn masked(bytes: &[u8]) -> [u8; 4] {
    #[expect(clippy::cast_possible_truncation, reason = "a CRC-32 has 32 bits")]
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// The message of the whole and undamaged frame at the start of `bytes`, and the length of the frame.
fn frame_at(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (check, rest) = rest.split_first_chunk::<4>()?;
    let n = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (message, rest) = rest.split_at_checked(n)?;
    let whole = masked(length) == *check && rest.first_chunk::<4>() == Some(&masked(message));
    whole.then_some((message, n + 16))
}

/// The step of an event as this program writes it: none where there is another.
fn step_of(event: &[u8]) -> Option<u64> {
    let rest = event.strip_prefix(&[0x09])?.get(8..)?;
    let Some(rest) = rest.strip_prefix(&[0x10]) else { return Some(0) };
    let (mut step, mut shift) = (0u64, 0u32);
    for &byte in rest {
        step |= u64::from(byte & 0x7f).checked_shl(shift)?;
        shift += 7;
        if byte < 0x80 {
            return Some(step);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::config::train::LatentFunction;

    /// Bit by bit, as CRC-32C is defined.
    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(
                crc ^ u32::from(byte),
                |crc, _| {
                    if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 }
                },
            )
        })
    }

    /// A field of a protobuf message.
    #[derive(Debug)]
    enum Value<'a> {
        Integer(u64),
        Double(f64),
        Float(f32),
        Bytes(&'a [u8]),
    }

    fn integer(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for i in 0.. {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 127) << (7 * i);
            if byte < 128 {
                break;
            }
        }
        value
    }

    fn message(mut bytes: &[u8]) -> Vec<(u64, Value<'_>)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = integer(&mut bytes);
            let size = match key & 7 {
                0 => 0,
                1 => 8,
                5 => 4,
                2 => integer(&mut bytes) as usize,
                other => panic!("wire type {other}"),
            };
            if key & 7 == 0 {
                fields.push((key >> 3, Value::Integer(integer(&mut bytes))));
                continue;
            }
            let (value, rest) = bytes.split_at(size);
            bytes = rest;
            fields.push((
                key >> 3,
                match key & 7 {
                    1 => Value::Double(f64::from_le_bytes(value.try_into().unwrap())),
                    5 => Value::Float(f32::from_le_bytes(value.try_into().unwrap())),
                    _ => Value::Bytes(value),
                },
            ));
        }
        fields
    }

    /// Steps with their scalars; the first event must name the version.
    fn read(mut bytes: &[u8]) -> Vec<(u64, Vec<(String, f32)>)> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            for (part, at) in [(&bytes[..8], 8), (&bytes[12..12 + n], 12 + n)] {
                let crc = crc32c(part);
                let masked = crc.rotate_left(17).wrapping_add(0xa282_ead8);
                assert_eq!(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()), masked);
            }
            events.push(message(&bytes[12..12 + n]));
            bytes = &bytes[n + 16..];
        }
        let first = events.remove(0);
        assert!(first.iter().any(|field| matches!(field, (3, Value::Bytes(b"brain.Event:2")))), "{first:?}");
        let event = |fields: Vec<(u64, Value<'_>)>| {
            let (mut step, mut scalars) = (0, Vec::new());
            for field in fields {
                match field {
                    (1, Value::Double(time)) => assert!(time > 1.7e9),
                    (2, Value::Integer(value)) => step = value,
                    (5, Value::Bytes(summary)) => {
                        for value in message(summary) {
                            let (1, Value::Bytes(value)) = value else { panic!("{value:?}") };
                            let [(1, Value::Bytes(tag)), (2, Value::Float(number))] = message(value)[..]
                            else {
                                panic!("not a scalar")
                            };
                            scalars.push((String::from_utf8(tag.to_vec()).unwrap(), number));
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
            (step, scalars)
        };
        events.into_iter().map(event).collect()
    }

    fn line(step: u64) -> Line {
        Line {
            step,
            tokens: step * 8,
            loss: 0.5,
            mse: 0.25,
            l0: 3.0,
            fvu: 0.375,
            dead: 0.25,
            lambda: 7.0,
            lr: 1e-3,
            skipped: 2,
            tokens_per_s: 1000.0,
            waiting: 0.125,
            speed: crate::train::speed::Speed { mfu: Some(0.5), ..Default::default() },
        }
    }

    #[test]
    fn another_reader_finds_the_scalars_under_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig { width: 400, ..TrainConfig::default() };
        let mut events = Events::open(folder.path(), 0, &config).unwrap();
        events.write(&line(300)).unwrap();
        let found = read(&fs::read(folder.path().join(FILE)).unwrap());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, 300);
        let value = |name: &str| found[0].1.iter().find(|(tag, _)| tag == name).map(|(_, value)| *value);
        for (name, wanted) in [
            ("losses/overall_loss", 0.5),
            ("losses/mse_loss", 0.25),
            ("metrics/l0", 3.0),
            ("metrics/explained_variance", 0.625),
            ("sparsity/dead_features", 100.0),
            ("details/current_learning_rate", 1e-3),
            ("details/n_training_samples", 2400.0),
            ("details/l0_coefficient", 7.0),
            ("performance/mfu", 0.5),
        ] {
            assert_eq!(value(name), Some(wanted), "{name}");
        }
        let gated = TrainConfig { activation: LatentFunction::Gated, ..config.clone() };
        let topk = TrainConfig { activation: LatentFunction::TopK, ..config };
        let name = |config| Events::open(folder.path(), 0, config).unwrap().coefficient;
        assert_eq!((name(&gated), name(&topk)), (Some("details/l1_coefficient"), None));
    }

    #[test]
    fn resuming_keeps_the_events_up_to_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let (config, path) = (TrainConfig::default(), folder.path().join(FILE));
        let mut events = Events::open(folder.path(), 0, &config).unwrap();
        for step in [10, 200, 300_000] {
            events.write(&line(step)).unwrap();
        }
        let whole = fs::read(&path).unwrap();
        let steps = || read(&fs::read(&path).unwrap()).iter().map(|event| event.0).collect::<Vec<_>>();
        // Cut off in the middle of a frame, or damaged: what comes before is kept.
        for damage in [whole.len() - 3, whole.len() - 40] {
            let mut broken = whole.clone();
            broken[damage] ^= 1;
            fs::write(&path, &broken).unwrap();
            Events::open(folder.path(), 400_000, &config).unwrap();
            assert_eq!(steps(), [10, 200]);
            fs::write(&path, &whole[..damage]).unwrap();
            let mut events = Events::open(folder.path(), 400_000, &config).unwrap();
            events.write(&line(400_010)).unwrap();
            assert_eq!(steps(), [10, 200, 400_010]);
        }
        fs::write(&path, &whole).unwrap();
        let mut events = Events::open(folder.path(), 200, &config).unwrap();
        events.write(&line(250)).unwrap();
        assert_eq!(steps(), [10, 200, 250]);
        fs::write(&path, b"something else").unwrap();
        Events::open(folder.path(), 200, &config).unwrap();
        assert!(steps().is_empty());
    }
}
