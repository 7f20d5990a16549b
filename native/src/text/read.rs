//! One text file as a stream of documents.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;
use parquet::record::reader::RowIter;

use super::arrow::ArrowRows;
use super::cell::Cell;
use super::find::{Compression, Kind, TextSource};
use super::guard::foreign;
use super::json::{self, JsonRecords, Next};
use super::parquet as columns;
use super::shape::{cut_at, unwrap_lines};
use crate::store::manifest::TextCounts;

/// How documents are read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The field of JSON records and the column of Parquet and Arrow files to read.
    pub column: String,
    /// Whether it holds token ids instead of text.
    pub ids: bool,
    /// Documents longer than this many bytes (4 a token id) are cut into several.
    pub max_bytes: usize,
    /// Whether hard-wrapped lines are joined.
    pub unwrap_lines: bool,
}

/// A document: what the model reads as one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// Its text.
    Text(String),
    /// Its token ids, where the file holds them.
    Ids(Vec<u32>),
}

/// A JSON record may be this much longer than the longest document: escapes and other fields.
const LINE_FACTOR: usize = 16;

enum Records {
    Plain { reader: Box<dyn BufRead + Send>, buffer: Vec<u8>, ended: bool },
    Json(JsonRecords),
    Parquet(Box<RowIter<'static>>),
    Arrow(Box<ArrowRows>),
}

/// What is left of a record longer than a document may be.
enum Rest {
    Text(Vec<u8>),
    Ids(Vec<u32>),
}

/// The documents of one file, in order. Holds at most one record in memory (of an Arrow file, one batch).
pub struct Documents {
    records: Records,
    options: ReadOptions,
    name: String,
    counts: TextCounts,
    rest: Rest,
}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Documents")
            .field("name", &self.name)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Documents {
    /// Opens `source`, fetching it first if it is elsewhere.
    ///
    /// # Errors
    /// If it cannot be fetched or opened, or is a Parquet or Arrow file that is broken or has no such column.
    pub fn open(source: &TextSource, options: &ReadOptions) -> Result<Self> {
        let path = source.local()?;
        let name = if source.is_remote() { source.name() } else { path.display().to_string() };
        let file = File::open(&path).with_context(|| format!("cannot open text {name}"))?;
        let longest = options.max_bytes.saturating_mul(LINE_FACTOR);
        let records = match source.kind {
            Kind::Parquet => {
                let rows = foreign(|| columns::rows(file, &options.column, options.ids, &path));
                Records::Parquet(Box::new(rows.with_context(|| format!("cannot read text {name}"))?))
            }
            Kind::Arrow => {
                let rows = foreign(|| ArrowRows::open(file, &options.column, options.ids, &path));
                Records::Arrow(Box::new(rows.with_context(|| format!("cannot read text {name}"))?))
            }
            Kind::Plain if options.ids => bail!("{name} is plain text, which holds no token ids"),
            Kind::Plain => Records::Plain {
                reader: unpacked(file, source.compression)?,
                buffer: Vec::new(),
                ended: false,
            },
            Kind::Json => Records::Json(JsonRecords::new(unpacked(file, source.compression)?, longest)),
        };
        let (counts, rest) = (TextCounts::default(), Rest::Text(Vec::new()));
        Ok(Self { records, options: options.clone(), name, counts, rest })
    }

    /// What was found so far. `documents` counts those returned.
    #[must_use]
    pub fn counts(&self) -> TextCounts {
        self.counts
    }

    /// The next document that holds something, or `None` at the end of the file.
    ///
    /// # Errors
    /// If the file cannot be read further.
    pub fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            let piece = self.next_piece().with_context(|| format!("cannot read text {}", self.name))?;
            let Some(piece) = piece else { return Ok(None) };
            let bytes = match piece {
                Rest::Text(bytes) => bytes,
                Rest::Ids(ids) => {
                    self.counts.documents += 1;
                    return Ok(Some(Document::Ids(ids)));
                }
            };
            let text = match String::from_utf8(bytes) {
                Ok(text) => text,
                Err(error) => {
                    self.counts.invalid_utf8 += 1;
                    String::from_utf8_lossy(error.as_bytes()).into_owned()
                }
            };
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            if text.trim().is_empty() {
                self.counts.empty += 1;
                continue;
            }
            self.counts.documents += 1;
            let text =
                if self.options.unwrap_lines { unwrap_lines(text).into_owned() } else { text.to_owned() };
            return Ok(Some(Document::Text(text)));
        }
    }

    /// The next at most `max_bytes` bytes of a record.
    fn next_piece(&mut self) -> Result<Option<Rest>> {
        let most = self.options.max_bytes;
        if let Records::Plain { reader, buffer, ended } = &mut self.records {
            if !*ended {
                let wanted = (most + 1).saturating_sub(buffer.len()) as u64;
                let read = reader.by_ref().take(wanted).read_to_end(buffer)?;
                *ended = (read as u64) < wanted;
            }
            if buffer.is_empty() {
                return Ok(None);
            }
            self.counts.cut += u64::from(buffer.len() > most);
            let rest = buffer.split_off(cut_at(buffer, most));
            return Ok(Some(Rest::Text(std::mem::replace(buffer, rest))));
        }
        let is_empty = match &self.rest {
            Rest::Text(bytes) => bytes.is_empty(),
            Rest::Ids(ids) => ids.is_empty(),
        };
        if is_empty {
            match self.next_record()? {
                Some(record) => self.rest = record,
                None => return Ok(None),
            }
        }
        Ok(Some(match &mut self.rest {
            Rest::Text(bytes) => {
                self.counts.cut += u64::from(bytes.len() > most);
                let rest = bytes.split_off(cut_at(bytes, most));
                Rest::Text(std::mem::replace(bytes, rest))
            }
            Rest::Ids(ids) => {
                let most = (most / 4).max(1);
                self.counts.cut += u64::from(ids.len() > most);
                let rest = ids.split_off(ids.len().min(most));
                Rest::Ids(std::mem::replace(ids, rest))
            }
        }))
    }

    fn next_record(&mut self) -> Result<Option<Rest>> {
        loop {
            let cell = match &mut self.records {
                Records::Plain { .. } => return Ok(None),
                Records::Json(records) => match records.next()? {
                    Next::End => return Ok(None),
                    Next::Whole(record) if record.trim_ascii().is_empty() => continue,
                    Next::Whole(record) => json::field(&record, &self.options.column),
                    Next::TooLong => Cell::Other,
                },
                Records::Parquet(rows) => match foreign(|| Ok(rows.next().transpose()?))? {
                    None => return Ok(None),
                    Some(row) => columns::cell(&row),
                },
                Records::Arrow(rows) => match foreign(|| rows.next())? {
                    None => return Ok(None),
                    Some(cell) => cell,
                },
            };
            match cell {
                Cell::Text(bytes) if !self.options.ids && !bytes.is_empty() => {
                    return Ok(Some(Rest::Text(bytes)));
                }
                Cell::Ids(ids) if self.options.ids && !ids.is_empty() => return Ok(Some(Rest::Ids(ids))),
                Cell::Text(_) if !self.options.ids => self.counts.empty += 1,
                Cell::Ids(_) if self.options.ids => self.counts.empty += 1,
                _ => self.counts.malformed += 1,
            }
        }
    }
}

fn unpacked(file: File, compression: Compression) -> Result<Box<dyn BufRead + Send>> {
    let plain = BufReader::with_capacity(1 << 16, file);
    Ok(match compression {
        Compression::None => Box::new(plain),
        Compression::Gzip => Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(plain))),
        Compression::Zstd => {
            Box::new(BufReader::with_capacity(1 << 16, zstd::stream::read::Decoder::with_buffer(plain)?))
        }
    })
}

#[cfg(test)]
mod tests;
