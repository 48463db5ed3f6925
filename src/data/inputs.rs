//! One's own files: which ones `--source`, `--valid` and `--test` name, and what is in each, as its name says.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Plain text.
    Text,
    /// An object in each line, with a document in one of its fields.
    Jsonl,
    /// A table with a document in each row of one of its columns.
    Parquet,
    /// Token ids, as nanoGPT and llm.c write them.
    Ids,
}

/// How a file is compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// The endings of names that are read.
pub const ENDINGS: &str = ".txt, .jsonl (each also with .gz or .zst), .parquet or .bin";

/// A file of one's own.
#[derive(Debug, Clone)]
pub struct Input {
    #[allow(missing_docs)]
    pub path: PathBuf,
    #[allow(missing_docs)]
    pub format: Format,
    #[allow(missing_docs)]
    pub packing: Packing,
}

impl Input {
    /// What a file is, by its name; plain text if that says nothing.
    pub fn of(path: &Path) -> Self {
        let text = || Self { path: path.into(), format: Format::Text, packing: Packing::Plain };
        Self::known(path.into()).unwrap_or_else(text)
    }

    /// What a file is, by its name; `None` if that says nothing.
    fn known(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (name, packing) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
            (Some(name), _) => (name, Packing::Gzip),
            (_, Some(name)) => (name, Packing::Zstd),
            _ => (name, Packing::Plain),
        };
        let format = match (Path::new(name).extension()?.to_str()?, packing) {
            // WikiText's own endings are text, too.
            ("txt" | "raw" | "tokens", _) => Format::Text,
            ("jsonl", _) => Format::Jsonl,
            ("parquet", Packing::Plain) => Format::Parquet,
            ("bin", Packing::Plain) => Format::Ids,
            _ => return None,
        };
        Some(Self { path, format, packing })
    }
}

/// A value of `--valid` or `--test`: what is set aside.
#[derive(Debug, Clone, PartialEq)]
pub enum Aside {
    /// This share of the documents, above 0 and below 1.
    Share(f64),
    /// A file, a folder or a pattern of its own.
    Named(String),
}

impl FromStr for Aside {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let Some(number) = text.strip_suffix('%') else { return Ok(Self::Named(text.into())) };
        let percent = number.parse::<f64>().ok().filter(|percent| 0.0 < *percent && *percent < 100.0);
        let percent = percent.ok_or("expected a percentage above 0% and below 100%, for example 5%, or files")?;
        Ok(Self::Share(percent / 100.0))
    }
}

/// The files that the values of an option name: themselves, those in folders, and those that match patterns. Folders and
/// patterns give them in the order of their names.
///
/// # Errors
/// Usage for a name that leads to no file, or to one that is not read; data for a folder that cannot be listed.
pub fn find(option: &str, names: &[String]) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for name in names {
        let wrong = |expected: &dyn Display, reason: &str| {
            Error::Usage(format!("{option} {name}: expected {expected}; {reason}"))
        };
        let path = Path::new(name);
        let before = found.len();
        if path.is_dir() {
            walk(path, &mut found)?;
        } else if path.is_file() {
            let known = Input::known(path.into());
            found.push(known.ok_or_else(|| {
                let reason = "this name says nothing; if it is plain text, rename it to .txt";
                wrong(&format_args!("a file whose name ends with {ENDINGS}"), reason)
            })?);
        } else if name.contains(['*', '?', '[']) {
            let paths = glob::glob(name).map_err(|e| wrong(&"a pattern of names", &e.to_string()))?;
            for path in paths {
                let path = path.map_err(|e| Error::read(e.path(), e.error()))?;
                match path.is_dir() {
                    true => walk(&path, &mut found)?,
                    false => found.extend(Input::known(path)),
                }
            }
        } else {
            let expected = match option {
                "--source" => "a file, a folder or a pattern",
                _ => "a percentage, for example 5%, or files",
            };
            return Err(wrong(&expected, "there is no such file or folder").into());
        }
        if found.len() == before {
            return Err(wrong(&format_args!("files that end with {ENDINGS}"), "there is none").into());
        }
    }
    Ok(found)
}

/// Adds the files below a folder in the order of their names. Hidden ones, and those that hold something else, are none.
fn walk(folder: &Path, found: &mut Vec<Input>) -> Result<()> {
    let unreadable = |e| Error::read(folder, e);
    let entries: std::io::Result<Vec<_>> = fs::read_dir(folder).map_err(unreadable)?.collect();
    let mut entries = entries.map_err(unreadable)?;
    entries.retain(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."));
    entries.sort_by_key(fs::DirEntry::file_name);
    for path in entries.into_iter().map(|entry| entry.path()) {
        // A link to a folder may lead back to it.
        match path.is_dir() {
            true if path.is_symlink() => {}
            true => walk(&path, found)?,
            false => found.extend(Input::known(path)),
        }
    }
    Ok(())
}
