//! What is prepared: texts and files, the documents in them, and which split each goes to.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Display;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::documents::{Cutter, Documents, Event, Sorter, Unit};
use super::download::byte_bar;
use super::inputs::{find, Aside, Format, Input};
use super::wikitext::{Source, Split, Text};
use super::{ids, records};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// What `prepare` leaves to choose beside source and tokenizer.
#[derive(Debug, Clone)]
pub struct Choices {
    /// What is set aside for validation: a share, or files.
    pub valid: Vec<Aside>,
    /// What is set aside for a test.
    pub test: Vec<Aside>,
    /// What counts as a document; if nobody says, each record, a single text as a whole, and each of several text files.
    pub documents: Option<Documents>,
    /// Whether each document is followed by an end of text.
    pub document_ends: bool,
    /// The field or column with the documents of records, `text` if nobody says.
    pub text_field: Option<String>,
    /// No file of a data folder gets larger than this.
    pub shard_bytes: u64,
}

impl Default for Choices {
    fn default() -> Self {
        Self {
            valid: Vec::new(),
            test: Vec::new(),
            documents: None,
            document_ends: false,
            text_field: None,
            shard_bytes: 1 << 30,
        }
    }
}

impl Choices {
    /// Whether nothing is set aside.
    pub fn is_none(&self) -> bool {
        self.valid.is_empty() && self.test.is_empty()
    }

    /// Refuses what a source of one plain text a split does not leave to choose.
    ///
    /// # Errors
    /// Usage.
    pub fn none_for(&self, source: &Source) -> Result<()> {
        let wrong = |what: &str| Err(Error::Usage(format!("{what}; {source} has splits of its own")).into());
        match self {
            _ if !self.is_none() => wrong("--valid and --test split a file"),
            Self { text_field: Some(_), .. } => wrong("--text-field names a field of .jsonl and .parquet files"),
            Self { documents: Some(Documents::Record), .. } => {
                wrong("--documents record is for .jsonl and .parquet files")
            }
            _ => Ok(()),
        }
    }
}

/// Files of one's own.
#[derive(Debug, Clone)]
pub struct OwnFiles {
    names: Vec<String>,
    files: Vec<Input>,
    valid: Held,
    test: Held,
}

/// What an option sets aside.
#[derive(Debug, Clone)]
enum Held {
    Nothing,
    Share(f64),
    Files(Vec<Input>),
}

impl Held {
    fn find(option: &str, asides: &[Aside]) -> Result<Self> {
        if let [Aside::Share(share)] = asides {
            return Ok(Self::Share(*share));
        }
        let names: Option<Vec<String>> = asides
            .iter()
            .map(|aside| match aside {
                Aside::Named(name) => Some(name.clone()),
                Aside::Share(_) => None,
            })
            .collect();
        let names =
            names.ok_or_else(|| Error::Usage(format!("{option}: expected one percentage, or files, found both")))?;
        match names[..] {
            [] => Ok(Self::Nothing),
            _ => find(option, &names).map(Self::Files),
        }
    }

    fn share(&self) -> f64 {
        match self {
            Self::Share(share) => *share,
            _ => 0.0,
        }
    }

    fn files(&self) -> &[Input] {
        match self {
            Self::Files(files) => files,
            _ => &[],
        }
    }
}

impl Display for OwnFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.names[..] {
            [first, second, third, _, ..] => {
                write!(f, "{first} {second} {third} and {} more", self.names.len() - 3)
            }
            names => f.write_str(&names.join(" ")),
        }
    }
}

impl OwnFiles {
    /// The files that names and choices lead to.
    ///
    /// # Errors
    /// Usage for names that lead nowhere, for a file that is named twice, and for choices that contradict each other or the
    /// files; data for a folder that cannot be read.
    pub fn find(names: &[String], choices: &Choices) -> Result<Self> {
        let files = find("--source", names)?;
        let (valid, test) = (Held::find("--valid", &choices.valid)?, Held::find("--test", &choices.test)?);
        let own = Self { names: names.to_vec(), files, valid, test };
        let refused = |reason: String| Err(Error::Usage(reason).into());
        if let Held::Nothing = own.valid {
            return refused(format!(
                "--source {own}: nothing is set aside for validation; say how much of it to set aside, for example --valid 5%, or \
                 name files for it with --valid"
            ));
        }
        if own.valid.share() + own.test.share() >= 1.0 {
            return refused("--valid and --test leave nothing to train on".into());
        }
        own.refuse_twins()?;
        let all = || own.files.iter().chain(own.valid.files()).chain(own.test.files());
        let is_text = |input: &&Input| input.format == Format::Text;
        match choices.documents {
            Some(Documents::Record) => {
                if let Some(text) = all().find(is_text) {
                    let path = text.path.display();
                    return refused(format!(
                        "--documents record: {path} has no records; expected line, file or blank-line"
                    ));
                }
            }
            Some(_) if !all().any(|input| is_text(&input)) => {
                return refused("--documents: expected record, since no file is plain text; leave it out".into());
            }
            _ => {}
        }
        if choices.text_field.is_some() && !all().any(|input| matches!(input.format, Format::Jsonl | Format::Parquet)) {
            return refused(
                "--text-field: expected a .jsonl or .parquet file, whose field it names; leave it out".into(),
            );
        }
        Ok(own)
    }

    /// Refuses a file that is named twice: its documents would be in two splits, or twice in one.
    fn refuse_twins(&self) -> Result<()> {
        let mut seen: HashMap<(u64, u64), (&str, &PathBuf)> = HashMap::new();
        let options = [("--source", &self.files[..]), ("--valid", self.valid.files()), ("--test", self.test.files())];
        for (option, files) in options {
            for Input { path, .. } in files {
                let file = path.metadata().map_err(|e| Error::read(path, e))?;
                if let Some((other, twin)) = seen.insert((file.dev(), file.ino()), (option, path)) {
                    return Err(Error::Usage(format!(
                        "{option} {}: the same file as {other} {}; expected each file once, so that no document is in two \
                         splits, or twice in one",
                        path.display(),
                        twin.display()
                    ))
                    .into());
                }
            }
        }
        Ok(())
    }

    /// Makes the files readable.
    ///
    /// # Errors
    /// Data if a file is empty or cannot be read.
    pub fn corpus(&self, choices: &Choices) -> Result<Corpus> {
        let shares = [self.valid.share(), self.test.share()];
        let draws = shares != [0.0; 2];
        let mut parts = Vec::new();
        let splits =
            [(Split::Train, &self.files[..]), (Split::Valid, self.valid.files()), (Split::Test, self.test.files())];
        for (split, files) in splits {
            for Input { path, format, packing } in files {
                let text = Text::File(path.clone(), *packing);
                let unit = match choices.documents {
                    Some(documents) => Unit::Documents(documents),
                    None if files.len() > 1 => Unit::Documents(Documents::File),
                    None if split == Split::Train && draws && *format == Format::Text => cut(&text, shares)?,
                    None => Unit::Whole,
                };
                let to = (split != Split::Train || !draws).then_some(split);
                parts.push(Part { text, format: *format, unit, to });
            }
        }
        Corpus { parts, shares, ends: choices.document_ends, field: field(choices), name: self.to_string() }.checked()
    }
}

/// The field that holds a record's document.
fn field(choices: &Choices) -> String {
    choices.text_field.clone().unwrap_or_else(|| "text".into())
}

/// Where a single text is cut: training first, what is set aside last.
fn cut(text: &Text, [valid, test]: [f64; 2]) -> Result<Unit> {
    let length = text.length()?;
    // The place that leaves this share of the bytes.
    let place = |share: f64| length - (length as f64 * share).round() as u64;
    // Without a test split, not even an empty line at the end is in it.
    Ok(Unit::Cut([place(valid + test), if test > 0.0 { place(test) } else { u64::MAX }]))
}

/// Texts and files, ready to be read.
#[derive(Debug)]
pub struct Corpus {
    parts: Vec<Part>,
    /// Which shares of the documents are set aside for validation and for the test.
    shares: [f64; 2],
    /// Whether each document is followed by an end of text.
    ends: bool,
    field: String,
    name: String,
}

#[derive(Debug)]
struct Part {
    text: Text,
    format: Format,
    unit: Unit,
    /// The split of all its documents; `None` if each has its own.
    to: Option<Split>,
}

impl Part {
    fn file(&self) -> &Path {
        match &self.text {
            Text::File(path, _) => path,
            _ => Path::new(""),
        }
    }
}

impl Corpus {
    /// One text a split, in the order of [`Split::ALL`].
    ///
    /// # Errors
    /// Data if a text is empty or cannot be read.
    pub fn of_splits(texts: [Text; 3], choices: &Choices) -> Result<Self> {
        let unit = choices.documents.map_or(Unit::Whole, Unit::Documents);
        let parts = Split::ALL.into_iter().zip(texts);
        let parts = parts.map(|(split, text)| Part { text, format: Format::Text, unit, to: Some(split) }).collect();
        let (ends, field, name) = (choices.document_ends, field(choices), String::new());
        Self { parts, shares: [0.0; 2], ends, field, name }.checked()
    }

    /// One file as a split. If its name does not say what it holds, it is plain text.
    ///
    /// # Errors
    /// Data if it is empty or cannot be read.
    pub fn of_file(path: &Path, split: Split) -> Result<Self> {
        let Input { path, format, packing } = Input::of(path);
        let parts = vec![Part { text: Text::File(path, packing), format, unit: Unit::Whole, to: Some(split) }];
        let field = field(&Choices::default());
        Self { parts, shares: [0.0; 2], ends: false, field, name: String::new() }.checked()
    }

    fn checked(self) -> Result<Self> {
        for part in &self.parts {
            if part.text.size()? == 0 {
                return Err(nothing_in(&part.text));
            }
            if matches!(part.format, Format::Text | Format::Jsonl) && part.text.is_marked()? {
                tracing::info!("{} begins with a byte order mark, which is left out", part.text);
            }
        }
        Ok(self)
    }

    /// Whether each document is followed by an end of text.
    pub fn marks_ends(&self) -> bool {
        self.ends
    }

    /// Whether there is something for a split.
    pub fn has(&self, split: Split) -> bool {
        let share = match split {
            Split::Train => 1.0 - self.shares[0] - self.shares[1],
            Split::Valid => self.shares[0],
            Split::Test => self.shares[1],
        };
        self.parts.iter().any(|part| part.to == Some(split) || part.to.is_none() && share > 0.0)
    }

    /// A file of token ids among the sources.
    pub fn ids(&self) -> Option<&Path> {
        self.parts.iter().find(|part| part.format == Format::Ids).map(Part::file)
    }

    /// Calls `each` with what the texts consist of, many events at a time. Records and documents end with a newline, unless
    /// ends of text part them.
    ///
    /// # Errors
    /// Those of `each`; data if a file cannot be read.
    pub fn for_each_text(&self, label: &'static str, mut each: impl FnMut(&[Event]) -> Result<()>) -> Result<()> {
        let texts = || self.parts.iter().filter(|part| part.format != Format::Ids);
        let bar = byte_bar(label, texts().map(|part| part.text.size()).sum::<Result<u64>>()?);
        let mut sorter = Sorter::new(self.shares);
        for part in texts() {
            let mut next = || part.to.unwrap_or_else(|| sorter.sort());
            let mut records = |documents: Vec<String>| {
                let events = documents.into_iter().flat_map(|mut text| {
                    if !self.ends && !text.ends_with('\n') {
                        text.push('\n');
                    }
                    let split = next();
                    [Event::Text(split, Cow::Owned(text)), Event::End(split)]
                });
                each(&events.collect::<Vec<_>>())
            };
            match part.format {
                Format::Jsonl => records::jsonl(&part.text, &self.field, &bar, records)?,
                Format::Parquet => records::parquet(part.file(), &self.field, &bar, &mut records)?,
                Format::Text | Format::Ids => {
                    let mut cutter = Cutter::new(part.unit, !self.ends, next);
                    part.text.for_each_chunk(&bar, |chunk, place| each(&cutter.cut(chunk, place)))?;
                    each(cutter.finish().as_slice())?;
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Calls `each` with the ids that are there already, piece by piece, and with the split of each.
    ///
    /// # Errors
    /// Those of `each`; data if a file cannot be read, or has ids that are not the tokenizer's.
    pub fn for_each_ids(&self, tokenizer: &Tokenizer, mut each: impl FnMut(Split, &[u32]) -> Result<()>) -> Result<()> {
        let files = || self.parts.iter().filter(|part| part.format == Format::Ids);
        let bar = byte_bar("ids", files().map(|part| part.text.size()).sum::<Result<u64>>()?);
        let mut sorter = Sorter::new(self.shares);
        for part in files() {
            let mut open = None;
            ids::for_each_piece(part.file(), tokenizer, &bar, |piece, ends| {
                let split = *open.get_or_insert_with(|| part.to.unwrap_or_else(|| sorter.sort()));
                if ends {
                    open = None;
                }
                each(split, piece)
            })?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The error for a split without a word.
    pub fn empty(&self, split: Split) -> anyhow::Error {
        match self.parts.iter().find(|part| part.to == Some(split)) {
            Some(part) => nothing_in(&part.text),
            None => Error::Data(format!(
                "{}: not a single word is left for the {split} split; it has too few documents, or lines: set more aside, or \
                 name files for the split, with --valid and --test",
                self.name
            ))
            .into(),
        }
    }
}

fn nothing_in(text: &Text) -> anyhow::Error {
    Error::Data(format!("{text}: expected text, found not a single word; every split needs some")).into()
}
