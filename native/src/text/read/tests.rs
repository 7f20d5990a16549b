//! Every kind of file: whole, packed, broken, hostile.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;

fn options() -> ReadOptions {
    ReadOptions { column: "text".to_owned(), ids: false, max_bytes: 1000, unwrap_lines: false }
}

fn read(path: &Path, options: &ReadOptions) -> Result<(Vec<String>, TextCounts)> {
    let mut documents = Documents::open(&TextSource::recognise(path).unwrap(), options)?;
    let mut all = Vec::new();
    while let Some(document) = documents.next_document()? {
        match document {
            Document::Text(text) => all.push(text),
            Document::Ids(ids) => all.push(format!("{ids:?}")),
        }
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
    let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
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
        assert!(format!("{error:#}").contains(word), "{error:#}");
    }
    let bytes = std::fs::read(&path).unwrap();
    let cut = write(folder.path(), "cut.parquet", &bytes[..bytes.len() / 2]);
    assert!(read(&cut, &options()).unwrap_err().to_string().contains("cut.parquet"));
}

#[test]
fn arrays_of_objects_read_like_lines() {
    let folder = tempfile::tempdir().unwrap();
    let text = br#"
      [ {"text": "one \" } {"}, {"text": "two", "more": {"a": [1, {"b": "]"}]}}, {"id": 3}, 7, {"text": ""} ]"#;
    let (documents, counts) = read(&write(folder.path(), "a.json", text), &options()).unwrap();
    assert_eq!(documents, ["one \" } {", "two"]);
    assert_eq!((counts.malformed, counts.empty), (1, 1));
    let long = format!("[{{\"text\": \"{}\"}}, {{\"text\": \"after\"}}", "x".repeat(1000 * LINE_FACTOR));
    let (documents, counts) = read(&write(folder.path(), "b.json", long.as_bytes()), &options()).unwrap();
    assert_eq!((documents, counts.malformed), (vec!["after".to_owned()], 1));
    let (documents, counts) =
        read(&write(folder.path(), "c.json", br#"[{"text": "cut"#), &options()).unwrap();
    assert_eq!((documents.len(), counts.malformed), (0, 1));
}

#[test]
fn ids_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let lines = b"{\"ids\": [1, 2, 3]}\n{\"ids\": []}\n{\"ids\": [1, -2]}\n{\"ids\": \"text\"}\n{\"ids\": [4294967296]}\n";
    let ids = ReadOptions { column: "ids".to_owned(), ids: true, ..options() };
    let (documents, counts) = read(&write(folder.path(), "a.jsonl", lines), &ids).unwrap();
    assert_eq!(documents, ["[1, 2, 3]"]);
    assert_eq!((counts.empty, counts.malformed), (1, 3));
    let short = ReadOptions { max_bytes: 8, ..ids.clone() };
    let (documents, counts) = read(&write(folder.path(), "a.jsonl", lines), &short).unwrap();
    assert_eq!((documents.join(" "), counts.cut), ("[1, 2] [3]".to_owned(), 1));
    let error = read(&write(folder.path(), "a.txt", b"1 2"), &ids).unwrap_err().to_string();
    assert!(error.contains("a.txt is plain text"), "{error}");
}

/// Batches with a column of every accepted type: two batches, a null and an empty text among the rows.
fn arrow_batches() -> Vec<arrow_array::RecordBatch> {
    use arrow_array::builder::{Int64Builder, ListBuilder};
    use arrow_array::types::Int8Type;
    use arrow_array::{
        ArrayRef, DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
    };
    let batch = |rows: &[Option<&str>]| {
        let mut lists = ListBuilder::new(Int64Builder::new());
        for row in rows {
            row.iter().flat_map(|text| text.bytes()).for_each(|b| lists.values().append_value(b.into()));
            lists.append(row.is_some());
        }
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("id", Arc::new(Int64Array::from_iter_values(0..rows.len() as i64))),
            ("text", Arc::new(StringArray::from(rows.to_vec()))),
            ("large", Arc::new(LargeStringArray::from(rows.to_vec()))),
            ("view", Arc::new(StringViewArray::from(rows.to_vec()))),
            ("named", Arc::new(rows.iter().copied().collect::<DictionaryArray<Int8Type>>())),
            ("ids", Arc::new(lists.finish())),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    };
    vec![batch(&[Some("one"), None, Some("")]), batch(&[]), batch(&[Some("a text longer than twelve bytes")])]
}

/// The batches as a stream or a file, compressed or not. A stream may replace dictionaries, a file may not.
fn arrow_bytes(stream: bool, packed: Option<arrow_ipc::CompressionType>) -> Vec<u8> {
    use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
    let mut batches = arrow_batches();
    if !stream {
        let without: Vec<usize> = (0..6).filter(|&i| i != 4).collect();
        batches = batches.iter().map(|b| b.project(&without).unwrap()).collect();
    }
    let options = IpcWriteOptions::default().try_with_compression(packed).unwrap();
    let schema = batches[0].schema();
    let mut bytes = Vec::new();
    if stream {
        let mut writer = StreamWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.finish().unwrap();
    } else {
        let mut writer = FileWriter::try_new_with_options(&mut bytes, &schema, options).unwrap();
        batches.iter().for_each(|batch| writer.write(batch).unwrap());
        writer.finish().unwrap();
    }
    bytes
}

#[test]
fn arrow_streams_and_files_read_alike() {
    use arrow_ipc::CompressionType;
    let folder = tempfile::tempdir().unwrap();
    for stream in [true, false] {
        for packed in [None, Some(CompressionType::ZSTD), Some(CompressionType::LZ4_FRAME)] {
            let path = write(folder.path(), "a.arrow", &arrow_bytes(stream, packed));
            for column in ["text", "large", "view", "named"] {
                if column == "named" && !stream {
                    continue;
                }
                let options = ReadOptions { column: column.to_owned(), ..options() };
                let (documents, counts) = read(&path, &options).unwrap();
                assert_eq!(
                    documents,
                    ["one", "a text longer than twelve bytes"],
                    "{column} {stream} {packed:?}"
                );
                assert_eq!((counts.malformed, counts.empty), (1, 1), "{column}");
            }
            let ids = ReadOptions { column: "ids".to_owned(), ids: true, ..options() };
            let (documents, counts) = read(&path, &ids).unwrap();
            assert_eq!((documents.len(), documents[0].as_str()), (2, "[111, 110, 101]"));
            assert_eq!((counts.malformed, counts.empty), (1, 1));
            for (column, ids, word) in
                [("body", false, "id, text"), ("id", false, "Int64"), ("text", true, "Utf8")]
            {
                let options = ReadOptions { column: column.to_owned(), ids, ..options() };
                let error = format!("{:#}", read(&path, &options).unwrap_err());
                assert!(error.contains(word), "{error}");
            }
        }
    }
}

/// Files with any one byte changed or cut anywhere give an error or other text, but no panic and no huge allocation.
#[test]
fn damaged_arrow_and_parquet_files_are_survived() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    parquet_file(&path, &[Some("one"), None, Some(""), Some("two")]);
    let zstd = Some(arrow_ipc::CompressionType::ZSTD);
    let files = [
        ("a.parquet", std::fs::read(&path).unwrap()),
        ("s.arrow", arrow_bytes(true, None)),
        ("z.arrow", arrow_bytes(true, zstd)),
        ("f.arrow", arrow_bytes(false, None)),
    ];
    let mut failed = 0;
    for (name, bytes) in files {
        let step = (bytes.len() / 150).max(1);
        for at in (0..bytes.len()).step_by(step) {
            for flip in [0x01, 0x80, 0xFF] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                let path = write(folder.path(), name, &damaged);
                failed += u32::from(read(&path, &options()).is_err());
            }
            let path = write(folder.path(), name, &bytes[..at]);
            failed += u32::from(read(&path, &options()).is_err());
        }
    }
    assert!(failed > 150, "{failed}");
}
