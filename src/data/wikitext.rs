//! Where text comes from: the sample, a folder, a file, or WikiText's published archives.
//!
//! A [`Source`] is what `--source` names; [`Source::texts`] turns it into one [`Text`] a split, which
//! is read as a stream of whole lines. WikiText's formats: tokenized (`wiki.train.tokens`, rare words
//! replaced by `<unk>`) and raw (`wiki.train.raw`), after Merity et al. 2016, "Pointer Sentinel
//! Mixture Models".

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::{download, sample};
use crate::error::{Error, Result};

/// Text is read in pieces of about this many bytes, cut at a line's end: enough for every core to fill
/// its cache of words, little beside the memory of any machine.
const CHUNK: u64 = 16 << 20;
/// No published split is larger; a declared size beyond it is an archive made to fill the machine.
const MAX_TEXT: u64 = 2 << 30;
/// WikiText's author serves the archives here; the first home, at S3, answers 403 now.
const MIRROR: &str = "https://wikitext.smerity.com";
/// An archive's longest line: a few bytes of an archive can stand for any number of them, and lines are read whole.
const MAX_LINE: u64 = 64 << 20;
/// A sample's size is given in these.
const MB: u64 = 1_000_000;
/// The sample is made in memory.
const MAX_SAMPLE_MB: u64 = 1000;
/// A byte order mark, with which some programs begin a text in UTF-8. It is no text.
pub const MARK: &str = "\u{feff}";
/// Names and SHA-256 of the archives NAME-v1.zip.
const PUBLISHED: [(&str, &str); 4] = [
    ("wikitext-2", "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"),
    ("wikitext-2-raw", "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    ("wikitext-103", "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
    ("wikitext-103-raw", "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
];

/// The three parts of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What the model learns from; a trained tokenizer too.
    Train,
    /// What picks the best checkpoint.
    Valid,
    /// What is looked at last.
    Test,
}

impl Split {
    /// All splits, in the order in which they are written.
    pub const ALL: [Self; 3] = [Self::Train, Self::Valid, Self::Test];

    /// The name in files and tables: `train`, `valid` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Valid => "valid",
            Self::Test => "test",
        }
    }
}

impl Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A published zip archive of one corpus; its texts are `NAME/wiki.{train,valid,test}.ENDING`.
#[derive(Debug, Clone)]
pub struct Archive {
    /// The corpus, such as `wikitext-2-raw`; the ending is `raw` after `-raw` and `tokens` elsewhere.
    pub name: String,
    /// Where it is downloaded from.
    pub url: String,
    /// SHA-256 of the archive in lower-case hexadecimal digits, wherever it comes from.
    pub sha256: String,
}

impl Archive {
    /// Where the archive is in the folder of downloads.
    fn file(&self, downloads: &Path) -> PathBuf {
        downloads.join(format!("{}.zip", self.name))
    }

    /// Removes the download, and the folder if nothing else is in it.
    ///
    /// # Errors
    /// Storage if the file cannot be removed.
    pub fn remove_download(&self, downloads: &Path) -> Result<()> {
        let file = self.file(downloads);
        fs::remove_file(&file).map_err(|e| Error::write(&file, e))?;
        // Another archive's download may be in it.
        let _ = fs::remove_dir(downloads);
        Ok(())
    }
}

/// Where a corpus comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Stories that a grammar makes, and how many bytes of them.
    Sample(u64),
    /// A folder with a text file a split.
    Folder(PathBuf),
    /// A text file, and which shares of it, 0 to 1, are set aside for validation and for the test.
    File(PathBuf, [f64; 2]),
    /// A published archive.
    Published(Archive),
}

impl Source {
    /// Reads what `--source` and `--url` say; a published name wins over a folder of that name.
    ///
    /// # Errors
    /// Usage for a source that is neither a known name nor a folder or a text file, and for a URL beside a
    /// source that is not downloaded.
    pub fn parse(source: &str, url: Option<&str>) -> Result<Self> {
        if let Some((name, sha256)) = PUBLISHED.iter().find(|(name, _)| *name == source) {
            let url = url.map_or_else(|| format!("{MIRROR}/{name}-v1.zip"), String::from);
            return Ok(Self::Published(Archive { name: name.to_string(), url, sha256: sha256.to_string() }));
        }
        let names = PUBLISHED.map(|(name, _)| name).join(", ");
        if let Some(url) = url {
            return Err(Error::Usage(format!(
                "--url {url} with --source {source}: only {names} are downloaded; leave --url out"
            ))
            .into());
        }
        match source {
            "sample" => Ok(Self::Sample(sample::BYTES)),
            made if made.starts_with("sample:") => sample_of(made),
            folder if Path::new(folder).is_dir() => Ok(Self::Folder(folder.into())),
            file if Path::new(file).is_file() && file.ends_with(".txt") => Ok(Self::File(file.into(), [0.0; 2])),
            _ => {
                let found = match Path::new(source).exists() {
                    true => "this is something else; give a text file a name that ends with .txt",
                    false => "there is no such file or folder",
                };
                let expected = format!("expected sample, {names}, a folder, or a .txt file");
                Err(Error::Usage(format!("--source {source}: {expected}; {found}")).into())
            }
        }
    }

    /// Sets shares of a file aside, 0 to 1 each; every other source brings its own splits.
    ///
    /// # Errors
    /// Usage, if the shares leave nothing to train on, a file has none for validation, or another source has any.
    pub fn set_aside(self, valid: Option<f64>, test: Option<f64>) -> Result<Self> {
        let refused = |reason: String| Err(Error::Usage(reason).into());
        match (self, valid, test) {
            (Self::File(path, _), Some(valid), test) if valid + test.unwrap_or(0.0) < 1.0 => {
                Ok(Self::File(path, [valid, test.unwrap_or(0.0)]))
            }
            (Self::File(..), Some(_), _) => refused("--valid and --test leave nothing to train on".into()),
            (Self::File(path, _), None, _) => refused(format!(
                "--source {}: a file has no validation split; say how much of it to set aside, for example --valid 5%",
                path.display()
            )),
            (source, None, None) => Ok(source),
            (source, ..) => refused(format!("--valid and --test split a file; {source} has splits of its own")),
        }
    }

    /// Makes the splits readable, in the order of [`Split::ALL`]; a published archive is downloaded
    /// into the folder `downloads`, if it is not there from an earlier attempt.
    ///
    /// # Errors
    /// Data if a split is missing, empty, unreadable or cannot be had; Storage if the
    /// download cannot be written.
    pub fn texts(&self, downloads: &Path) -> Result<[Text; 3]> {
        let texts = match self {
            Self::Sample(bytes) => Split::ALL.map(|split| Text::Made(split, sample::text(split, *bytes))),
            Self::Folder(folder) => files_in(folder)?.map(Text::File),
            Self::File(path, shares) => parts_of(path, *shares)?,
            Self::Published(archive) => {
                let file = archive.file(downloads);
                download::fetch(&archive.url, &archive.sha256, &file)?;
                refuse_escapes(&file)?;
                let ending = match archive.name.ends_with("-raw") {
                    true => "raw",
                    false => "tokens",
                };
                Split::ALL.map(|split| Text::Entry {
                    archive: file.clone(),
                    name: format!("{}/wiki.{split}.{ending}", archive.name),
                })
            }
        };
        for text in texts.iter().filter(|text| !matches!(text, Text::Nothing)) {
            if text.size()? == 0 {
                return Err(text.empty());
            }
            let mut start = Vec::new();
            text.read(|reader| reader.take(MARK.len() as u64).read_to_end(&mut start).map_err(|e| text.unreadable(e)))?;
            if start == MARK.as_bytes() {
                tracing::info!("{text} begins with a byte order mark, which is left out");
            }
        }
        Ok(texts)
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sample(sample::BYTES) => f.write_str("sample"),
            Self::Sample(bytes) => write!(f, "sample:{}MB", bytes / MB),
            Self::Folder(path) | Self::File(path, _) => path.display().fmt(f),
            Self::Published(archive) => f.write_str(&archive.name),
        }
    }
}

/// A sample of so many megabytes, from `sample:30MB`.
fn sample_of(source: &str) -> Result<Source> {
    let megabytes = source.strip_prefix("sample:").and_then(|size| size.strip_suffix("MB")).map(str::parse::<u64>);
    match megabytes {
        Some(Ok(megabytes @ 1..=MAX_SAMPLE_MB)) => Ok(Source::Sample(megabytes * MB)),
        _ => Err(Error::Usage(format!(
            "--source {source}: expected sample, or its size in whole megabytes from 1 to {MAX_SAMPLE_MB}, as in sample:30MB"
        ))
        .into()),
    }
}

/// The three files of a folder: the names that end alike and are all there.
fn files_in(folder: &Path) -> Result<[PathBuf; 3]> {
    let patterns = ["wiki.*.tokens", "wiki.*.raw", "wiki.*.txt", "*.txt"];
    let files = patterns.map(|pattern| Split::ALL.map(|split| folder.join(pattern.replace('*', split.name()))));
    let complete: Vec<_> = (0..patterns.len()).filter(|&i| files[i].iter().all(|file| file.is_file())).collect();
    let wrong = match complete[..] {
        [only] => return Ok(files[only].clone()),
        [] => missing(&files),
        _ => format!(
            "found {}; keep one in the folder",
            complete.iter().map(|&i| patterns[i]).collect::<Vec<_>>().join(" and ")
        ),
    };
    Err(Error::Data(format!(
        "{}: expected the files of one of {} with train, valid and test for the star; {wrong}",
        folder.display(),
        patterns.join(", ")
    ))
    .into())
}

/// What the most complete of several sets of files lacks.
fn missing(sets: &[[PathBuf; 3]]) -> String {
    let names = |set: &[PathBuf; 3], there: bool| {
        let names = set.iter().filter(|file| file.is_file() == there).filter_map(|file| file.file_name());
        names.map(|name| name.to_string_lossy()).collect::<Vec<_>>().join(" and ")
    };
    let count = |set: &&[PathBuf; 3]| set.iter().filter(|file| file.is_file()).count();
    match sets.iter().max_by_key(count).filter(|set| count(set) > 0) {
        Some(set) => format!(
            "found {} without {}; a single file is split if it is named itself, with --valid 5%",
            names(set, true),
            names(set, false)
        ),
        None => "found none of them".into(),
    }
}

/// A file in three parts, cut where lines end: training first, what is set aside last.
fn parts_of(path: &Path, [valid, test]: [f64; 2]) -> Result<[Text; 3]> {
    let unreadable = |e| Error::read(path, e);
    let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
    let size = file.get_ref().metadata().map_err(unreadable)?.len();
    // The start of the first line at or after the place that leaves this share of the bytes.
    let mut cut = |share: f64| match size - (size as f64 * share).round() as u64 {
        0 => Ok(0),
        place => {
            file.seek(SeekFrom::Start(place - 1))?;
            Ok(place - 1 + file.skip_until(b'\n')? as u64)
        }
    };
    let [first, second] = [cut(valid + test), cut(test)].map(|place| place.map_err(unreadable));
    let (first, second) = (first?, second?);
    let part = |range| Text::Part(path.into(), range);
    let last = if test > 0.0 { part(second..size) } else { Text::Nothing };
    Ok([part(0..first), part(first..second), last])
}

/// Entries are only ever read, never extracted; still, an archive whose entries point out of its
/// folder was made to do harm, so nothing of it is used.
fn refuse_escapes(file: &Path) -> Result<()> {
    let zip = open_zip(file)?;
    for i in 0..zip.len() {
        let entry = zip.by_index_data(i).map_err(|e| Error::read(file, e))?;
        let name = String::from_utf8_lossy(entry.name_raw());
        let reason = if entry.is_symlink() {
            "is a symbolic link"
        } else if name.starts_with(['/', '\\']) || name.contains(':') {
            "has an absolute path"
        } else if name.split(['/', '\\']).any(|part| part == "..") {
            "points out of its folder"
        } else {
            continue;
        };
        return Err(Error::Data(format!(
            "{}: entry {name:?} {reason}: expected plain files within one folder; do not trust this \
             archive, name another mirror with --url",
            file.display()
        ))
        .into());
    }
    Ok(())
}

fn open_zip(file: &Path) -> Result<ZipArchive<File>> {
    let opened = File::open(file).map_err(|e| Error::read(file, e))?;
    ZipArchive::new(opened).map_err(|e| Error::read(file, e))
}

/// The text of one split, read as a stream.
#[derive(Debug)]
pub enum Text {
    /// A split of the sample.
    Made(Split, String),
    /// A file.
    File(PathBuf),
    /// These bytes of a file.
    Part(PathBuf, Range<u64>),
    /// A split that nobody asked for.
    Nothing,
    /// An entry of a zip archive.
    Entry {
        /// The archive's file.
        archive: PathBuf,
        /// The entry's name in it.
        name: String,
    },
}

impl Text {
    /// Bytes of the text, as the file system or the archive declares them.
    ///
    /// # Errors
    /// Data if the file or the entry is not there, or declares more than any corpus holds.
    pub fn size(&self) -> Result<u64> {
        match self {
            Self::Made(_, text) => Ok(text.len() as u64),
            Self::File(path) => Ok(path.metadata().map_err(|e| Error::read(path, e))?.len()),
            Self::Part(_, range) => Ok(range.end - range.start),
            Self::Nothing => Ok(0),
            Self::Entry { archive, name } => {
                let mut zip = open_zip(archive)?;
                let entry = zip.by_name(name).map_err(|e| self.unreadable(e))?;
                if entry.size() > MAX_TEXT {
                    let size = entry.size();
                    return Err(self.unreadable(format!("it declares {size} bytes, expected at most {MAX_TEXT}")));
                }
                Ok(entry.size())
            }
        }
    }

    /// Calls `each` with pieces of some MiB that end at a line's end, in order; gives the number of
    /// bytes. Line ends stay as they are, "\r\n" included, and the last line may lack one. A byte order mark at the start is
    /// left out.
    ///
    /// # Errors
    /// Those of `each`; Data if the text cannot be read or is not UTF-8.
    pub fn for_each_chunk(&self, each: impl FnMut(&str) -> Result<()>) -> Result<u64> {
        let (start, max_line) = match self {
            Self::Part(_, range) => (range.start, u64::MAX),
            Self::Entry { .. } => (0, MAX_LINE),
            _ => (0, u64::MAX),
        };
        self.read(|reader| self.chunks(reader, start, max_line, each))
    }

    /// Gives the text's bytes to `work`.
    fn read<T>(&self, work: impl FnOnce(&mut dyn Read) -> Result<T>) -> Result<T> {
        let open = |path: &Path| File::open(path).map_err(|e| Error::read(path, e));
        match self {
            Self::Made(_, text) => work(&mut text.as_bytes()),
            Self::Nothing => work(&mut std::io::empty()),
            Self::File(path) => work(&mut open(path)?),
            Self::Part(path, range) => {
                let mut file = open(path)?;
                file.seek(SeekFrom::Start(range.start)).map_err(|e| Error::read(path, e))?;
                work(&mut file.take(range.end - range.start))
            }
            Self::Entry { archive, name } => {
                let mut zip = open_zip(archive)?;
                // The library holds the entry to its CRC and to no more than its declared size.
                let mut entry = zip.by_name(name).map_err(|e| self.unreadable(e))?;
                work(&mut entry)
            }
        }
    }

    fn chunks(
        &self,
        reader: &mut dyn Read,
        start: u64,
        max_line: u64,
        mut each: impl FnMut(&str) -> Result<()>,
    ) -> Result<u64> {
        let mut buffer = Vec::new();
        // Bytes of the file before the buffer, and those that were passed on.
        let (mut before, mut passed) = (start, 0);
        loop {
            let held = buffer.len();
            let read = (&mut *reader).take(CHUNK).read_to_end(&mut buffer);
            let read = read.map_err(|e| self.unreadable(e))?;
            let end = match buffer[held..].iter().rposition(|&byte| byte == b'\n') {
                _ if read == 0 => buffer.len(),
                Some(newline) => held + newline + 1,
                None if buffer.len() as u64 > max_line => {
                    return Err(self.unreadable(format!("a line has more than {max_line} bytes")));
                }
                None => continue,
            };
            let text = std::str::from_utf8(&buffer[..end]).map_err(|e| {
                let at = e.valid_up_to();
                Error::Data(format!(
                    "{self}: expected UTF-8, found byte 0x{:02x} at byte offset {}; convert the file to \
                     UTF-8, with iconv for instance",
                    buffer[at],
                    before + at as u64
                ))
            })?;
            let text = if before == start { text.strip_prefix(MARK).unwrap_or(text) } else { text };
            if !text.is_empty() {
                each(text)?;
            }
            passed += text.len() as u64;
            before += end as u64;
            if read == 0 {
                return Ok(passed);
            }
            buffer.drain(..end);
        }
    }

    /// The error for a split without a word.
    pub fn empty(&self) -> anyhow::Error {
        Error::Data(format!("{self}: expected text, found not a single word; every split needs some")).into()
    }

    fn unreadable(&self, reason: impl Display) -> anyhow::Error {
        Error::Data(format!("cannot read {self}: {reason}")).into()
    }
}

impl Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Made(split, _) => write!(f, "the sample's {split} split"),
            Self::File(path) => path.display().fmt(f),
            Self::Part(path, range) => write!(f, "bytes {} to {} of {}", range.start, range.end, path.display()),
            Self::Nothing => f.write_str("no text"),
            Self::Entry { archive, name } => write!(f, "{name} in {}", archive.display()),
        }
    }
}
