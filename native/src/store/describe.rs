//! A store in words, for `inspect` and the end of a harvest.

use std::fmt::Write;

use super::Store;
use super::manifest::{Manifest, Split};

impl Store {
    /// What the store holds, in a few aligned lines. For machines, serialise [`Store::manifest`].
    #[must_use]
    pub fn describe(&self) -> String {
        let m = &self.manifest;
        let mut text = format!("store {}\n", self.place.show(""));
        let mut line = |name: &str, value: String| {
            // Writing into a String cannot fail.
            let _ = writeln!(text, "  {name:<10} {value}");
        };
        let sha = m.model.sha256.get(..12).unwrap_or(&m.model.sha256);
        line(
            "model",
            format!(
                "{} ({}, {} layers, d_model {}, run in {}; {sha})",
                m.model.name, m.model.architecture, m.n_layers, m.d_model, m.model.precision
            ),
        );
        line("text", text_line(m));
        line(
            "tokenizer",
            format!(
                "{} tokens, {} of them special",
                grouped(m.tokenizer.vocab_size as u64),
                grouped(m.tokenizer.special_ids.len() as u64)
            ),
        );
        line("sequences", sequences_line(m));
        line("dropped", dropped_line(m));
        for split in Split::ALL {
            let info = m.split(split);
            let tokens = info.n_sequences * m.sequence_length as u64;
            let value = format!(
                "{} vectors a tap, {} shards; {} sequences, {} tokens",
                grouped(info.n_vectors),
                info.shards.len(),
                grouped(info.n_sequences),
                grouped(tokens)
            );
            line(split.folder(), value);
        }
        line("bytes", format!("{} as {}", bytes(m.shard_bytes()), m.dtype.safetensors_name().to_lowercase()));
        for (i, tap) in m.taps.iter().enumerate() {
            let shards = m.train.shards.iter().chain(&m.held_out.shards);
            let size = bytes(shards.filter_map(|shard| shard.files.get(i)).map(|file| file.bytes).sum());
            line(&tap.point.to_string(), format!("width {}, C {:.6}, {size}", tap.width, tap.scale));
        }
        line("checksums", checksums_line(m));
        text
    }
}

fn checksums_line(m: &Manifest) -> String {
    let files = m.files();
    let quick = files.iter().filter(|(_, file)| file.crc64.is_some()).count();
    let how = if quick == files.len() { "CRC-64 at every reading, SHA-256 with --verify" } else { "SHA-256" };
    format!("of {} files: {how}", grouped(files.len() as u64))
}

/// The most names of text files that are listed.
const NAMES: usize = 3;

fn text_line(m: &Manifest) -> String {
    let counts = m.text_counts;
    let mut names: Vec<_> = m.text.iter().take(NAMES).map(|file| file.name.as_str()).collect();
    if m.text.len() > NAMES {
        names.push("…");
    }
    let files = if m.text.len() == 1 { "file" } else { "files" };
    let mut text =
        format!("{} documents of {} {files} ({})", grouped(counts.documents), m.text.len(), names.join(", "));
    for (n, what) in [
        (counts.empty, "empty left out"),
        (counts.malformed, "malformed left out"),
        (counts.invalid_utf8, "with invalid UTF-8 replaced"),
        (counts.cut, "cut"),
        (counts.short, "shorter than a sequence left out"),
    ] {
        if n > 0 {
            let _ = write!(text, ", {} {what}", grouped(n));
        }
    }
    text
}

fn sequences_line(m: &Manifest) -> String {
    let token = |id: Option<u32>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
    format!(
        "{} tokens each, first token {}, separator {}, seed {}, shuffled in buckets of {}",
        m.sequence_length,
        token(m.tokenizer.bos),
        token(m.tokenizer.separator),
        m.seed,
        grouped(m.bucket_vectors)
    )
}

fn dropped_line(m: &Manifest) -> String {
    let mut special =
        if m.dropped.special_tokens { "special tokens" } else { "no special tokens" }.to_owned();
    if !m.tokenizer.dropped_ids.is_empty() {
        let _ = write!(special, ", {} other tokens", grouped(m.tokenizer.dropped_ids.len() as u64));
    }
    let positions: Vec<_> = m.dropped.positions.iter().map(u32::to_string).collect();
    if positions.is_empty() { special } else { format!("{special}, positions {}", positions.join(", ")) }
}

/// `1234567` as `1,234,567`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in the largest binary unit that leaves at least one before the point.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..0x10_0000 => format!("{:.1} KiB", n as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", n as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", n as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            (grouped(0), grouped(999), grouped(1_234_567)),
            ("0".into(), "999".into(), "1,234,567".into())
        );
        assert_eq!(
            (bytes(1023), bytes(1 << 20), bytes(3 << 29)),
            ("1023 B".into(), "1.0 MiB".into(), "1.50 GiB".into())
        );
    }
}
