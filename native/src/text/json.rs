//! Records of JSON files: an object a line, or the objects of one array; each bounded in length.

use std::io::{BufRead, Read};

use anyhow::Result;

use super::cell::Cell;

/// What a reader finds next.
pub(super) enum Next {
    /// A record's text.
    Whole(Vec<u8>),
    /// A record longer than allowed, passed over.
    TooLong,
    /// The end of the file.
    End,
}

/// A file of JSON records.
pub(super) struct JsonRecords {
    reader: Box<dyn BufRead + Send>,
    longest: usize,
    /// Whether the file is one array; known after the first byte.
    array: Option<bool>,
}

impl JsonRecords {
    pub(super) fn new(reader: Box<dyn BufRead + Send>, longest: usize) -> Self {
        Self { reader, longest, array: None }
    }

    pub(super) fn next(&mut self) -> Result<Next> {
        let array = match self.array {
            Some(array) => array,
            None => {
                let first =
                    skip(&mut self.reader, |b| b.is_ascii_whitespace() || b"\xEF\xBB\xBF".contains(&b))?;
                *self.array.insert(first == Some(b'['))
            }
        };
        if array {
            read_object(&mut self.reader, self.longest)
        } else {
            read_line(&mut self.reader, self.longest)
        }
    }
}

/// Passes over bytes as long as `pass` says so; the byte it stops at, which is not consumed.
fn skip(reader: &mut dyn BufRead, pass: impl Fn(u8) -> bool) -> Result<Option<u8>> {
    loop {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            return Ok(None);
        }
        let (at, n) = (available.iter().position(|&b| !pass(b)), available.len());
        if let Some(at) = at {
            let byte = available[at];
            reader.consume(at);
            return Ok(Some(byte));
        }
        reader.consume(n);
    }
}

/// The next object, whatever stands between it and the last.
fn read_object(reader: &mut dyn BufRead, longest: usize) -> Result<Next> {
    if skip(reader, |b| b != b'{')?.is_none() {
        return Ok(Next::End);
    }
    let mut object = Vec::new();
    let (mut depth, mut in_string, mut escaped, mut too_long) = (0usize, false, false, false);
    loop {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            // A truncated file: what there is cannot be parsed and is counted.
            return Ok(if too_long { Next::TooLong } else { Next::Whole(object) });
        }
        let mut end = None;
        for (i, &byte) in available.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                b'{' if !in_string => depth += 1,
                b'}' if !in_string => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 {
                end = Some(i + 1);
                break;
            }
        }
        let used = end.unwrap_or(available.len());
        too_long |= object.len() + used > longest;
        if too_long {
            object = Vec::new();
        } else {
            object.extend_from_slice(&available[..used]);
        }
        reader.consume(used);
        if end.is_some() {
            return Ok(if too_long { Next::TooLong } else { Next::Whole(object) });
        }
    }
}

/// Reads to the next newline; what exceeds `longest` bytes is passed over without being kept.
fn read_line(reader: &mut dyn BufRead, longest: usize) -> Result<Next> {
    let mut line = Vec::new();
    let read = reader.take(longest as u64 + 1).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(Next::End);
    }
    if line.len() <= longest || line.ends_with(b"\n") {
        return Ok(Next::Whole(line));
    }
    skip(reader, |b| b != b'\n')?;
    let newline = reader.fill_buf()?.len().min(1);
    reader.consume(newline);
    Ok(Next::TooLong)
}

/// The value of `column` in a record.
pub(super) fn field(record: &[u8], column: &str) -> Cell {
    // Invalid UTF-8 inside a string is kept for the common path, which counts and replaces it.
    let record = String::from_utf8_lossy(record);
    let Ok(mut record) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&record) else {
        return Cell::Other;
    };
    match record.remove(column) {
        Some(serde_json::Value::String(text)) => Cell::Text(text.into_bytes()),
        Some(serde_json::Value::Array(values)) => Cell::ids(values.iter().map(serde_json::Value::as_i64)),
        _ => Cell::Other,
    }
}
