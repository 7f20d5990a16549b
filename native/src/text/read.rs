//! One text file as a stream of documents.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flate2::bufread::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use super::find::{Compression, Kind, TextSource};
use super::shape::{cut_at, unwrap_lines};
use crate::store::manifest::TextCounts;

/// How documents are read.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// The field of JSON records and the column of Parquet files that holds the text.
    pub column: String,
    /// Documents longer than this many bytes are cut into several.
    pub max_bytes: usize,
    /// Whether hard-wrapped lines are joined.
    pub unwrap_lines: bool,
}

/// A JSON line may be this much longer than the longest document: escapes and other fields.
const LINE_FACTOR: usize = 16;

enum Records {
    Plain { reader: Box<dyn BufRead + Send>, buffer: Vec<u8>, ended: bool },
    JsonLines { reader: Box<dyn BufRead + Send> },
    Parquet { rows: Box<RowIter<'static>> },
}

/// The documents of one file, in order. Holds at most one record in memory.
pub struct Documents {
    records: Records,
    options: ReadOptions,
    name: String,
    counts: TextCounts,
    /// What is left of a record longer than a document may be.
    rest: Vec<u8>,
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
    /// Opens `source`.
    ///
    /// # Errors
    /// If it cannot be opened, or is a Parquet file that is broken or has no such text column.
    pub fn open(source: &TextSource, options: &ReadOptions) -> Result<Self> {
        let name = source.path.display().to_string();
        let file = File::open(&source.path).with_context(|| format!("cannot open text {name}"))?;
        let records = match source.kind {
            Kind::Parquet => {
                Records::Parquet { rows: Box::new(parquet_rows(file, &options.column, &source.path)?) }
            }
            Kind::Plain => Records::Plain {
                reader: unpacked(file, source.compression)?,
                buffer: Vec::new(),
                ended: false,
            },
            Kind::JsonLines => Records::JsonLines { reader: unpacked(file, source.compression)? },
        };
        Ok(Self { records, options: options.clone(), name, counts: TextCounts::default(), rest: Vec::new() })
    }

    /// What was found so far. `documents` counts those returned.
    #[must_use]
    pub fn counts(&self) -> TextCounts {
        self.counts
    }

    /// The next document that holds text, or `None` at the end of the file.
    ///
    /// # Errors
    /// If the file cannot be read further.
    pub fn next_document(&mut self) -> Result<Option<String>> {
        loop {
            let Some(bytes) = self.next_piece().with_context(|| format!("cannot read text {}", self.name))?
            else {
                return Ok(None);
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
            return Ok(Some(text));
        }
    }

    /// The next at most `max_bytes` bytes of a record.
    fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
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
            return Ok(Some(std::mem::replace(buffer, rest)));
        }
        if self.rest.is_empty() {
            match self.next_record()? {
                Some(record) => self.rest = record,
                None => return Ok(None),
            }
        }
        self.counts.cut += u64::from(self.rest.len() > most);
        let rest = self.rest.split_off(cut_at(&self.rest, most));
        Ok(Some(std::mem::replace(&mut self.rest, rest)))
    }

    fn next_record(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            let record = match &mut self.records {
                Records::Plain { .. } => return Ok(None),
                Records::JsonLines { reader } => {
                    let longest = self.options.max_bytes.saturating_mul(LINE_FACTOR);
                    match read_line(reader, longest)? {
                        Line::End => return Ok(None),
                        Line::Whole(line) if line.trim_ascii().is_empty() => continue,
                        Line::Whole(line) => json_text(&line, &self.options.column),
                        Line::TooLong => None,
                    }
                }
                Records::Parquet { rows } => match rows.next() {
                    None => return Ok(None),
                    Some(row) => match row?.get_column_iter().next().map(|(_, field)| field) {
                        Some(Field::Str(text)) => Some(text.as_bytes().to_vec()),
                        Some(Field::Bytes(bytes)) => Some(bytes.data().to_vec()),
                        _ => None,
                    },
                },
            };
            match record {
                Some(bytes) if bytes.is_empty() => self.counts.empty += 1,
                Some(bytes) => return Ok(Some(bytes)),
                None => self.counts.malformed += 1,
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

enum Line {
    Whole(Vec<u8>),
    TooLong,
    End,
}

/// Reads to the next newline; what exceeds `longest` bytes is passed over without being kept.
fn read_line(reader: &mut dyn BufRead, longest: usize) -> Result<Line> {
    let mut line = Vec::new();
    let read = reader.take(longest as u64 + 1).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(Line::End);
    }
    if line.len() <= longest || line.ends_with(b"\n") {
        return Ok(Line::Whole(line));
    }
    loop {
        let available = reader.fill_buf()?;
        let (used, done) = match available.iter().position(|&b| b == b'\n') {
            Some(at) => (at + 1, true),
            None => (available.len(), available.is_empty()),
        };
        reader.consume(used);
        if done {
            return Ok(Line::TooLong);
        }
    }
}

fn json_text(line: &[u8], column: &str) -> Option<Vec<u8>> {
    // Invalid UTF-8 inside a string is kept for the common path, which counts and replaces it.
    let line = String::from_utf8_lossy(line);
    let mut record: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line).ok()?;
    match record.remove(column)? {
        serde_json::Value::String(text) => Some(text.into_bytes()),
        _ => None,
    }
}

fn parquet_rows(file: File, column: &str, path: &Path) -> Result<RowIter<'static>> {
    let context = || format!("{} is no readable Parquet file", path.display());
    let reader = SerializedFileReader::new(file).with_context(context)?;
    let root = reader.metadata().file_metadata().schema_descr().root_schema().clone();
    let names: Vec<_> = root.get_fields().iter().map(|f| f.name().to_owned()).collect();
    let field = root.get_fields().iter().find(|f| f.name() == column).cloned().with_context(|| {
        format!("{} has no column `{column}`; its columns are {}", path.display(), names.join(", "))
    })?;
    let is_text = field.is_primitive() && field.get_physical_type() == parquet::basic::Type::BYTE_ARRAY;
    ensure!(is_text, "{}: column `{column}` does not hold text", path.display());
    let projection =
        Type::group_type_builder(root.name()).with_fields(vec![field]).build().with_context(context)?;
    RowIter::from_file_into(Box::new(reader)).project(Some(projection)).with_context(context)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;

    fn options() -> ReadOptions {
        ReadOptions { column: "text".to_owned(), max_bytes: 1000, unwrap_lines: false }
    }

    fn read(path: &Path, options: &ReadOptions) -> Result<(Vec<String>, TextCounts)> {
        let mut documents = Documents::open(&TextSource::recognise(path).unwrap(), options)?;
        let mut all = Vec::new();
        while let Some(document) = documents.next_document()? {
            all.push(document);
        }
        Ok((all, documents.counts()))
    }

    fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    const LINES: &[u8] = b"{\"text\": \"one\"}\n\n{\"text\": \"\"}\n{\"text\": 3}\n{\"body\": \"x\"}\nnot json\n{\"id\": 1, \"text\": \"two\\nlines\"}";

    #[test]
    fn json_lines_plain_and_compressed_read_alike() {
        let folder = tempfile::tempdir().unwrap();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(LINES).unwrap();
        let packed = [
            ("a.jsonl", LINES.to_vec()),
            ("b.jsonl.gz", gz.finish().unwrap()),
            ("c.jsonl.zst", zstd::encode_all(LINES, 1).unwrap()),
        ];
        for (name, bytes) in packed {
            let (documents, counts) = read(&write(folder.path(), name, &bytes), &options()).unwrap();
            assert_eq!(documents, ["one", "two\nlines"], "{name}");
            assert_eq!(
                counts,
                TextCounts { documents: 2, empty: 1, malformed: 3, ..TextCounts::default() },
                "{name}"
            );
        }
    }

    #[test]
    fn truncated_archives_are_errors_that_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = zstd::encode_all(LINES, 1).unwrap();
        let path = write(folder.path(), "cut.jsonl.zst", &bytes[..bytes.len() - 4]);
        assert!(read(&path, &options()).unwrap_err().to_string().contains("cut.jsonl.zst"));
        let path = write(folder.path(), "not.txt.gz", b"plain");
        assert!(read(&path, &options()).unwrap_err().to_string().contains("not.txt.gz"));
    }

    #[test]
    fn long_documents_are_cut_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let text = "A sentence of some length. ".repeat(100);
        let json = serde_json::json!({ "text": text }).to_string();
        for (name, bytes) in [("a.txt", text.as_bytes()), ("a.jsonl", json.as_bytes())] {
            let (documents, counts) = read(&write(folder.path(), name, bytes), &options()).unwrap();
            assert!(documents.len() == 3 && documents.iter().all(|d| d.len() <= 1000), "{name}");
            assert_eq!((documents.concat(), counts.cut), (text.clone(), 2), "{name}");
        }
    }

    #[test]
    fn invalid_utf8_is_replaced_and_counted_and_lines_are_unwrapped() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), "a.txt", b"\xEF\xBB\xBFcaf\xff one\ntwo\n");
        let (documents, counts) = read(&path, &ReadOptions { unwrap_lines: true, ..options() }).unwrap();
        assert_eq!((documents[0].as_str(), counts.invalid_utf8), ("caf\u{fffd} one two", 1));
        let (documents, counts) = read(&write(folder.path(), "e.txt", b" \n"), &options()).unwrap();
        assert_eq!((documents.len(), counts.empty), (0, 1));
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = vec![b'x'; 1000 * LINE_FACTOR + 5];
        bytes.extend_from_slice(b"\n{\"text\": \"after\"}\n");
        let (documents, counts) = read(&write(folder.path(), "a.jsonl", &bytes), &options()).unwrap();
        assert_eq!((documents, counts.malformed), (vec!["after".to_owned()], 1));
    }

    fn parquet_file(path: &Path, rows: &[Option<&str>]) {
        use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
        let schema = "message m { required int64 id; optional binary text (UTF8); }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let file = File::create(path).unwrap();
        let mut writer =
            parquet::file::writer::SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids: Vec<i64> = (0..rows.len() as i64).collect();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<_> = rows.iter().flatten().map(|&t| ByteArray::from(t)).collect();
        let levels: Vec<_> = rows.iter().map(|r| i16::from(r.is_some())).collect();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn parquet_rows_are_documents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        parquet_file(&path, &[Some("one"), None, Some(""), Some("two")]);
        let (documents, counts) = read(&path, &options()).unwrap();
        assert_eq!(documents, ["one", "two"]);
        assert_eq!((counts.malformed, counts.empty), (1, 1));
        for (column, word) in [("body", "id, text"), ("id", "does not hold text")] {
            let error = read(&path, &ReadOptions { column: column.to_owned(), ..options() }).unwrap_err();
            assert!(error.to_string().contains(word), "{error:#}");
        }
        let bytes = std::fs::read(&path).unwrap();
        let cut = write(folder.path(), "cut.parquet", &bytes[..bytes.len() / 2]);
        assert!(read(&cut, &options()).unwrap_err().to_string().contains("cut.parquet"));
    }
}
