//! One column of an Arrow file, in the file or the stream format, batch by batch.
//!
//! The file format is the stream format with a magic word in front and a table of contents behind, so both are read
//! from front to back. The framing is read here, so that no length is believed before it is compared with the file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef};
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_ipc::reader::{read_dictionary, read_record_batch};
use arrow_ipc::{MessageHeader, MetadataVersion, root_as_message};
use arrow_schema::{DataType, Schema};

use super::cell::Cell;

/// What the file format begins with.
const MAGIC: &[u8; 8] = b"ARROW1\0\0";
/// What a message begins with in all files of the last years; its length follows.
const CONTINUES: u32 = u32::MAX;
/// Compressed parts of a message may become this long together.
const MOST_UNPACKED: i64 = 1 << 30;

/// The values of one column.
pub(super) struct ArrowRows {
    reader: BufReader<File>,
    left: u64,
    schema: Arc<Schema>,
    column: usize,
    dictionaries: HashMap<i64, ArrayRef>,
    batch: Option<ArrayRef>,
    row: usize,
}

/// A message: its description and its body.
struct Message {
    metadata: Vec<u8>,
    body: Buffer,
}

impl ArrowRows {
    /// Opens the file; `ids` if the column is to hold lists of token ids.
    pub(super) fn open(file: File, column: &str, ids: bool, path: &Path) -> Result<Self> {
        let context = || format!("{} is no readable Arrow file", path.display());
        let left = file.metadata().with_context(context)?.len();
        let reader = BufReader::with_capacity(1 << 16, file);
        let mut rows = Self {
            reader,
            left,
            schema: Arc::new(Schema::empty()),
            column: 0,
            dictionaries: HashMap::new(),
            batch: None,
            row: 0,
        };
        let first = rows.first_message().with_context(context)?;
        let message = root_as_message(&first.metadata).map_err(|e| anyhow!("{e}")).with_context(context)?;
        let schema = message.header_as_schema().context("it does not begin with a schema");
        rows.schema = Arc::new(
            arrow_ipc::convert::try_fb_to_schema(schema.with_context(context)?).with_context(context)?,
        );
        let names: Vec<_> = rows.schema.fields().iter().map(|f| f.name().as_str()).collect();
        rows.column = rows.schema.index_of(column).map_err(|_| {
            anyhow!("{} has no column `{column}`; its columns are {}", path.display(), names.join(", "))
        })?;
        let kind = rows.schema.field(rows.column).data_type();
        let what = if ids { "lists of ids" } else { "text" };
        let fits = if ids { is_list(kind) } else { is_text(kind) };
        ensure!(fits, "{}: column `{column}` does not hold {what} but {kind}", path.display());
        Ok(rows)
    }

    fn take(&mut self, n: u64) -> Result<()> {
        ensure!(n <= self.left, "a part of {n} bytes is announced where {} are left", self.left);
        self.left -= n;
        Ok(())
    }

    fn word(&mut self) -> Result<u32> {
        self.take(4)?;
        let mut bytes = [0; 4];
        self.reader.read_exact(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn first_message(&mut self) -> Result<Message> {
        let first = self.word()?;
        let first = if first.to_le_bytes() == MAGIC[..4] {
            let second = self.word()?;
            ensure!(second.to_le_bytes() == MAGIC[4..], "it does not begin like one");
            // Some writers fill up to their alignment.
            let mut word = self.word()?;
            for _ in 0..16 {
                word = if word == 0 { self.word()? } else { word };
            }
            word
        } else {
            first
        };
        self.message_after(first)?.context("it is empty")
    }

    /// The next message; `None` at the end.
    fn message(&mut self) -> Result<Option<Message>> {
        if self.left == 0 {
            return Ok(None);
        }
        let first = self.word()?;
        self.message_after(first)
    }

    fn message_after(&mut self, first: u32) -> Result<Option<Message>> {
        let length = if first == CONTINUES { self.word()? } else { first };
        if length == 0 {
            return Ok(None);
        }
        self.take(length.into())?;
        let mut metadata = Vec::new();
        let read = (&mut self.reader).take(length.into()).read_to_end(&mut metadata)?;
        ensure!(read as u64 == u64::from(length), "the file ends in the middle");
        let message = root_as_message(&metadata).map_err(|e| anyhow!("{e}"))?;
        let length = u64::try_from(message.bodyLength()).context("a part has a negative length")?;
        self.take(length)?;
        let mut body = MutableBuffer::from_len_zeroed(usize::try_from(length)?);
        self.reader.read_exact(&mut body)?;
        Ok(Some(Message { metadata, body: body.into() }))
    }

    /// Reads on to the next batch that has rows; `false` at the end.
    fn next_batch(&mut self) -> Result<bool> {
        while let Some(Message { metadata, body }) = self.message()? {
            let message = root_as_message(&metadata).map_err(|e| anyhow!("{e}"))?;
            let version: MetadataVersion = message.version();
            match message.header_type() {
                MessageHeader::DictionaryBatch => {
                    let batch =
                        message.header_as_dictionary_batch().context("a dictionary without values")?;
                    check_unpacked(batch.data().context("a dictionary without values")?, &body)?;
                    read_dictionary(&body, batch, &self.schema, &mut self.dictionaries, &version)?;
                }
                MessageHeader::RecordBatch => {
                    let batch = message.header_as_record_batch().context("a batch without rows")?;
                    check_unpacked(batch, &body)?;
                    let batch = read_record_batch(
                        &body,
                        batch,
                        self.schema.clone(),
                        &self.dictionaries,
                        Some(&[self.column]),
                        &version,
                    )?;
                    self.row = 0;
                    self.batch = Some(batch.column(0).clone());
                    if batch.num_rows() > 0 {
                        return Ok(true);
                    }
                }
                other => return Err(anyhow!("a message of kind {other:?} among the data")),
            }
        }
        Ok(false)
    }

    /// The next value; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Cell>> {
        loop {
            if let Some(batch) = self.batch.as_ref().filter(|batch| self.row < batch.len()) {
                let value = cell(batch, self.row);
                self.row += 1;
                return Ok(Some(value));
            }
            if !self.next_batch()? {
                return Ok(None);
            }
        }
    }
}

/// Compressed buffers say how long they become; what a file says is not believed without limit.
fn check_unpacked(batch: arrow_ipc::RecordBatch<'_>, body: &[u8]) -> Result<()> {
    if batch.compression().is_none() {
        return Ok(());
    }
    let mut total = 0i64;
    for buffer in batch.buffers().into_iter().flatten() {
        let start = usize::try_from(buffer.offset()).unwrap_or(usize::MAX);
        let Some(length) = body.get(start..).and_then(|rest| rest.first_chunk::<8>()) else { continue };
        total = total.saturating_add(i64::from_le_bytes(*length).max(0));
    }
    ensure!(total <= MOST_UNPACKED, "a part says it becomes {total} bytes long, more than {MOST_UNPACKED}");
    Ok(())
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

fn is_list(kind: &DataType) -> bool {
    match kind {
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            field.data_type().is_integer()
        }
        _ => false,
    }
}

fn cell(array: &dyn Array, row: usize) -> Cell {
    if array.is_null(row) {
        return Cell::Other;
    }
    let text = |text: &str| Cell::Text(text.as_bytes().to_vec());
    let ids = |list: ArrayRef| Cell::ids((0..list.len()).map(|i| integer(&list, i)));
    match array.data_type() {
        DataType::Utf8 => text(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => text(array.as_string::<i64>().value(row)),
        DataType::Utf8View => text(array.as_string_view().value(row)),
        DataType::List(_) => ids(array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => ids(array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => ids(array.as_fixed_size_list().value(row)),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = integer(dictionary.keys(), row).and_then(|key| usize::try_from(key).ok());
            let values = dictionary.values();
            key.filter(|&key| key < values.len()).map_or(Cell::Other, |key| cell(values, key))
        }
        _ => Cell::Other,
    }
}

fn integer(array: &dyn Array, i: usize) -> Option<i64> {
    if array.is_null(i) {
        return None;
    }
    match array.data_type() {
        DataType::Int8 => Some(array.as_primitive::<Int8Type>().value(i).into()),
        DataType::Int16 => Some(array.as_primitive::<Int16Type>().value(i).into()),
        DataType::Int32 => Some(array.as_primitive::<Int32Type>().value(i).into()),
        DataType::Int64 => Some(array.as_primitive::<Int64Type>().value(i)),
        DataType::UInt8 => Some(array.as_primitive::<UInt8Type>().value(i).into()),
        DataType::UInt16 => Some(array.as_primitive::<UInt16Type>().value(i).into()),
        DataType::UInt32 => Some(array.as_primitive::<UInt32Type>().value(i).into()),
        DataType::UInt64 => i64::try_from(array.as_primitive::<UInt64Type>().value(i)).ok(),
        _ => None,
    }
}
