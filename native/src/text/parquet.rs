//! One column of a Parquet file.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::cell::Cell;

/// The rows of `column`; `ids` if it is to hold lists of token ids.
pub(super) fn rows(file: File, column: &str, ids: bool, path: &Path) -> Result<RowIter<'static>> {
    let context = || format!("{} is no readable Parquet file", path.display());
    let reader = SerializedFileReader::new(file).with_context(context)?;
    let root = reader.metadata().file_metadata().schema_descr().root_schema().clone();
    let names: Vec<_> = root.get_fields().iter().map(|f| f.name().to_owned()).collect();
    let field = root.get_fields().iter().find(|f| f.name() == column).cloned().with_context(|| {
        format!("{} has no column `{column}`; its columns are {}", path.display(), names.join(", "))
    })?;
    let is_text = field.is_primitive() && field.get_physical_type() == parquet::basic::Type::BYTE_ARRAY;
    if ids {
        ensure!(!field.is_primitive(), "{}: column `{column}` does not hold lists of ids", path.display());
    } else {
        ensure!(is_text, "{}: column `{column}` does not hold text", path.display());
    }
    let projection =
        Type::group_type_builder(root.name()).with_fields(vec![field]).build().with_context(context)?;
    RowIter::from_file_into(Box::new(reader)).project(Some(projection)).with_context(context)
}

/// The value of a row's only column.
pub(super) fn cell(row: &Row) -> Cell {
    match row.get_column_iter().next().map(|(_, field)| field) {
        Some(Field::Str(text)) => Cell::Text(text.as_bytes().to_vec()),
        Some(Field::Bytes(bytes)) => Cell::Text(bytes.data().to_vec()),
        Some(Field::ListInternal(list)) => Cell::ids(list.elements().iter().map(integer)),
        _ => Cell::Other,
    }
}

fn integer(field: &Field) -> Option<i64> {
    match *field {
        Field::Byte(v) => Some(v.into()),
        Field::Short(v) => Some(v.into()),
        Field::Int(v) => Some(v.into()),
        Field::Long(v) => Some(v),
        Field::UByte(v) => Some(v.into()),
        Field::UShort(v) => Some(v.into()),
        Field::UInt(v) => Some(v.into()),
        Field::ULong(v) => i64::try_from(v).ok(),
        _ => None,
    }
}
