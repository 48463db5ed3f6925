//! Documents that are records: the objects of a JSON Lines file, the rows of a Parquet file.

use std::fmt::{self, Formatter};
use std::fs::File;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

use indicatif::ProgressBar;
use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::ByteArrayType;
use parquet::file::reader::{FileReader, SerializedFileReader};
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::wikitext::{Text, CHUNK};
use crate::error::{Error, Result};

/// Rows of a Parquet file that are read at a time.
const ROWS: usize = 256;

/// Calls `each` with the documents in `field` of the objects in the lines of a text, many at a time. Empty documents, blank
/// lines and null are left out.
///
/// # Errors
/// Those of `each`; data, naming the line, if it holds something else.
pub fn jsonl(
    text: &Text,
    field: &str,
    bar: &ProgressBar,
    mut each: impl FnMut(Vec<String>) -> Result<()>,
) -> Result<()> {
    let mut before = 0;
    text.for_each_chunk(bar, |chunk, _| {
        let lines: Vec<&str> = chunk.split_inclusive('\n').collect();
        let documents: Vec<_> = lines.par_iter().map(|line| document(line, field)).collect();
        let mut found = Vec::with_capacity(documents.len());
        for (number, document) in documents.into_iter().enumerate() {
            let document = document.map_err(|reason| {
                let line = before + number + 1;
                Error::Data(format!(
                    "{text}, line {line}: expected an object with a text in \"{field}\", found {reason}"
                ))
            })?;
            found.extend(document.filter(|document| !document.is_empty()));
        }
        before += lines.len();
        each(found)
    })?;
    Ok(())
}

/// The document in a line; what else it holds, if it has none.
fn document(line: &str, field: &str) -> std::result::Result<Option<String>, String> {
    let line = line.trim();
    if line.is_empty() {
        return Ok(None);
    }
    let mut json = serde_json::Deserializer::from_str(line);
    let value = Field(field).deserialize(&mut json).and_then(|value| json.end().map(|()| value));
    // It knows of one line only, and calls it the first.
    match value.map_err(|e| e.to_string().replace("at line 1 column", "at column"))? {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Null) => Ok(None),
        Some(other) => Err(format!("{} there", short(&other.to_string()))),
        None => {
            let object: Map<String, Value> = serde_json::from_str(line).unwrap_or_default();
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(format!("{}; name the field with --text-field", short(&names.join(", "))))
        }
    }
}

/// A text as far as an error should show it.
fn short(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None if text.is_empty() => "nothing".into(),
        None => text.into(),
    }
}

/// Reads one field of an object and passes over the others.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> std::result::Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Self::Value, M::Error> {
        let mut found = None;
        while let Some(name) = map.next_key::<String>()? {
            match name == self.0 {
                true => found = Some(map.next_value()?),
                false => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// As [`jsonl`], for the rows of a Parquet file's column.
///
/// # Errors
/// Those of `each`; data if the file has no such column of texts, cannot be read, or, naming the row, is not UTF-8.
pub fn parquet(
    path: &Path,
    field: &str,
    bar: &ProgressBar,
    mut each: impl FnMut(Vec<String>) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::read(path, e))?;
    let size = file.metadata().map_err(|e| Error::read(path, e))?.len();
    let start = bar.position();
    let reader = guarded(path, || SerializedFileReader::new(file))?;
    let column = text_column(path, &reader, field)?;
    let rows = reader.metadata().file_metadata().num_rows().max(1) as u64;
    let mut row = 0;
    for group in 0..reader.num_row_groups() {
        let mut column = guarded(path, || reader.get_row_group(group)?.get_column_reader(column))?;
        let ColumnReader::ByteArrayColumnReader(column) = &mut column else {
            return Err(Error::read(path, format!("row group {} has another type of \"{field}\"", group + 1)));
        };
        loop {
            let Some(documents) = some_rows(path, column, &mut row)? else { break };
            each(documents)?;
            bar.set_position(start + (size as f64 * (row.min(rows) as f64 / rows as f64)) as u64);
        }
    }
    bar.set_position(start + size);
    Ok(())
}

/// The documents of the next rows, up to about [`CHUNK`] bytes; `None` after the last row of the group.
fn some_rows(path: &Path, column: &mut ColumnReaderImpl<ByteArrayType>, row: &mut u64) -> Result<Option<Vec<String>>> {
    let (mut documents, mut bytes, first) = (Vec::new(), 0, *row);
    while bytes < CHUNK {
        let (mut present, mut values) = (Vec::new(), Vec::new());
        let (rows, ..) = guarded(path, || column.read_records(ROWS, Some(&mut present), None, &mut values))?;
        if rows == 0 {
            break;
        }
        // A column that may hold nulls says which rows have a value.
        let mut places = present.iter().enumerate().filter_map(|(place, &level)| (level > 0).then_some(place as u64));
        for (place, value) in (0..).zip(&values) {
            let place = *row + places.next().unwrap_or(place);
            let text = std::str::from_utf8(value.data()).map_err(|e| {
                Error::Data(format!("{}, row {}: expected UTF-8, found {e}", path.display(), place + 1))
            })?;
            bytes += text.len() as u64;
            documents.extend((!text.is_empty()).then(|| text.to_owned()));
        }
        *row += rows as u64;
    }
    Ok((*row > first).then_some(documents))
}

/// The number of the column of this name, which must hold texts.
fn text_column(path: &Path, reader: &SerializedFileReader<File>, field: &str) -> Result<usize> {
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let found = columns.iter().position(|column| column.path().string() == field);
    let found = found.filter(|&at| columns[at].physical_type() == Type::BYTE_ARRAY && columns[at].max_rep_level() == 0);
    found.ok_or_else(|| {
        let names: Vec<String> =
            columns.iter().map(|column| format!("{} ({})", column.path().string(), column.physical_type())).collect();
        Error::Data(format!(
            "{}: expected a column \"{field}\" of texts, found {}; name the column with --text-field",
            path.display(),
            short(&names.join(", "))
        ))
        .into()
    })
}

/// Calls the Parquet library, which panics at some files that are damaged.
fn guarded<T>(path: &Path, work: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(parquet::errors::ParquetError::General("its content contradicts itself; the file is damaged".into()))
    });
    done.map_err(|e| Error::read(path, e))
}
