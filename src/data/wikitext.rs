//! Where text comes from: the sample, a folder, one's own files, or WikiText's published archives.
//!
//! A [`Source`] is what `--source` names; [`Source::corpus`] makes it readable. A [`Text`] of it is read as a stream of whole
//! lines. WikiText's formats: tokenized (`wiki.train.tokens`, rare words
//! replaced by `<unk>`) and raw (`wiki.train.raw`), after Merity et al. 2016, "Pointer Sentinel
//! Mixture Models".

use std::fmt::Display;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use indicatif::ProgressBar;
use zip::ZipArchive;

use super::corpus::{Choices, Corpus, OwnFiles};
use super::inputs::{find, Packing, ENDINGS};
use super::{download, sample};
use crate::error::{Error, Result};

/// Text is read in pieces of about this many bytes, cut at a line's end: enough for every core to fill
/// its cache of words, little beside the memory of any machine.
pub(super) const CHUNK: u64 = 16 << 20;
/// No published split is larger; a declared size beyond it is an archive made to fill the machine.
const MAX_TEXT: u64 = 2 << 30;
/// WikiText's author serves the archives here; the first home, at S3, answers 403 now.
const MIRROR: &str = "https://wikitext.smerity.com";
/// The longest line: lines are read whole, and a few bytes of an archive can stand for any number of them.
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
    /// One's own files.
    Files(OwnFiles),
    /// A published archive.
    Published(Archive),
}

impl Source {
    /// Reads what `--source`, `--url` and the options about one's own files say; a published name wins over a folder of that
    /// name.
    ///
    /// # Errors
    /// Usage for a source that is neither a known name nor a file that is read, for a URL beside a source that is not
    /// downloaded, and for choices that the source does not leave; data for a folder that cannot be read.
    pub fn parse(names: &[String], url: Option<&str>, choices: &Choices) -> Result<Self> {
        let known = match names {
            [name] => Self::known(name, url)?,
            _ => None,
        };
        if let (false, Some(url)) = (matches!(known, Some(Self::Published(_))), url) {
            return Err(Error::Usage(format!(
                "--url {url} with --source {}: only {} are downloaded; leave --url out",
                names.join(" "),
                PUBLISHED.map(|(name, _)| name).join(", ")
            ))
            .into());
        }
        match (known, names) {
            (Some(source), _) => choices.none_for(&source).map(|()| source),
            // A folder with files for at least two splits is meant as one with all three, so that no validation text is
            // trained on. Without choices any folder is that has some of these files, or no other that is read.
            (_, [name]) if Path::new(name).is_dir() => match sets_in(Path::new(name)) {
                sets if sets.iter().any(|set| set.iter().filter(|file| file.is_file()).count() > 1)
                    || choices.is_none() && (missing(&sets).is_some() || find("--source", names).is_err()) =>
                {
                    let source = Self::Folder(name.into());
                    choices.none_for(&source).map(|()| source)
                }
                _ => OwnFiles::find(names, choices).map(Self::Files),
            },
            _ => OwnFiles::find(names, choices).map(Self::Files),
        }
    }

    /// The source of a name that Lockstep knows.
    fn known(name: &str, url: Option<&str>) -> Result<Option<Self>> {
        if let Some((name, sha256)) = PUBLISHED.iter().find(|(published, _)| *published == name) {
            let url = url.map_or_else(|| format!("{MIRROR}/{name}-v1.zip"), String::from);
            let archive = Archive { name: name.to_string(), url, sha256: sha256.to_string() };
            return Ok(Some(Self::Published(archive)));
        }
        if name == "sample" {
            return Ok(Some(Self::Sample(sample::BYTES)));
        }
        if name.starts_with("sample:") {
            return sample_of(name).map(Some);
        }
        if url.is_some() || Path::new(name).exists() || name.contains(['*', '?', '[', '.', '/']) {
            return Ok(None);
        }
        let names = PUBLISHED.map(|(name, _)| name).join(", ");
        Err(Error::Usage(format!(
            "--source {name}: expected sample, {names}, or files or a folder of your own; there is no such file or folder"
        ))
        .into())
    }

    /// Makes the text readable; a published archive is downloaded into the folder `downloads`, if it is not there from an
    /// earlier attempt.
    ///
    /// # Errors
    /// Data if a text is missing, empty, unreadable or cannot be had; Storage if the
    /// download cannot be written.
    pub fn corpus(&self, choices: &Choices, downloads: &Path) -> Result<Corpus> {
        let texts = match self {
            Self::Sample(bytes) => Split::ALL.map(|split| Text::Made(split, sample::text(split, *bytes))),
            Self::Folder(folder) => files_in(folder)?.map(|path| Text::File(path, Packing::Plain)),
            Self::Files(files) => return files.corpus(choices),
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
        Corpus::of_splits(texts, choices)
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sample(sample::BYTES) => f.write_str("sample"),
            Self::Sample(bytes) => write!(f, "sample:{}MB", bytes / MB),
            Self::Folder(path) => path.display().fmt(f),
            Self::Files(files) => files.fmt(f),
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

/// The names of a folder's files with one text a split.
const PATTERNS: [&str; 4] = ["wiki.*.tokens", "wiki.*.raw", "wiki.*.txt", "*.txt"];

fn sets_in(folder: &Path) -> [[PathBuf; 3]; 4] {
    PATTERNS.map(|pattern| Split::ALL.map(|split| folder.join(pattern.replace('*', split.name()))))
}

fn is_complete(set: &[PathBuf; 3]) -> bool {
    set.iter().all(|file| file.is_file())
}

/// The three files of a folder: the names that end alike and are all there.
fn files_in(folder: &Path) -> Result<[PathBuf; 3]> {
    let sets = sets_in(folder);
    let complete: Vec<_> = (0..sets.len()).filter(|&i| is_complete(&sets[i])).collect();
    let wrong = match complete[..] {
        [only] => return Ok(sets[only].clone()),
        [] => missing(&sets).unwrap_or_else(|| format!("found none of them, and none that ends with {ENDINGS}")),
        _ => format!(
            "found {}; keep one in the folder",
            complete.iter().map(|&i| PATTERNS[i]).collect::<Vec<_>>().join(" and ")
        ),
    };
    Err(Error::Data(format!(
        "{}: expected the files of one of {} with train, valid and test for the star; {wrong}",
        folder.display(),
        PATTERNS.join(", ")
    ))
    .into())
}

/// What the most complete of several sets of files lacks; `None` if no file of any is there.
fn missing(sets: &[[PathBuf; 3]]) -> Option<String> {
    let names = |set: &[PathBuf; 3], there: bool| {
        let names = set.iter().filter(|file| file.is_file() == there).filter_map(|file| file.file_name());
        names.map(|name| name.to_string_lossy()).collect::<Vec<_>>().join(" and ")
    };
    let count = |set: &&[PathBuf; 3]| set.iter().filter(|file| file.is_file()).count();
    let set = sets.iter().max_by_key(count).filter(|set| count(set) > 0)?;
    Some(format!(
        "found {} without {}; a single file is split if it is named itself, with --valid 5%",
        names(set, true),
        names(set, false)
    ))
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

/// A text that is read as a stream.
#[derive(Debug)]
pub enum Text {
    /// A split of the sample.
    Made(Split, String),
    /// A file.
    File(PathBuf, Packing),
    /// An entry of a zip archive.
    Entry {
        /// The archive's file.
        archive: PathBuf,
        /// The entry's name in it.
        name: String,
    },
}

impl Text {
    /// Bytes of the text, or of the compressed file, as the file system or the archive declares them.
    ///
    /// # Errors
    /// Data if the file or the entry is not there, or declares more than any corpus holds.
    pub fn size(&self) -> Result<u64> {
        match self {
            Self::Made(_, text) => Ok(text.len() as u64),
            Self::File(path, _) => Ok(path.metadata().map_err(|e| Error::read(path, e))?.len()),
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

    /// Bytes of the text itself: a compressed file is read through.
    ///
    /// # Errors
    /// Data if the file cannot be read.
    pub fn length(&self) -> Result<u64> {
        match self {
            Self::File(_, Packing::Gzip | Packing::Zstd) => {
                let bar = download::byte_bar("measure", self.size()?);
                self.read(&bar, |reader| std::io::copy(reader, &mut std::io::sink()).map_err(|e| self.unreadable(e)))
            }
            _ => self.size(),
        }
    }

    /// Whether it begins with a byte order mark.
    ///
    /// # Errors
    /// Data if the text cannot be read.
    pub fn is_marked(&self) -> Result<bool> {
        let mut start = Vec::new();
        self.read(&ProgressBar::hidden(), |reader| {
            reader.take(MARK.len() as u64).read_to_end(&mut start).map_err(|e| self.unreadable(e))
        })?;
        Ok(start == MARK.as_bytes())
    }

    /// Calls `each` with pieces of some MiB that end at a line's end, in order, and with the place of each in bytes; gives the
    /// number of bytes. Line ends stay as they are, "\r\n" included, and the last line may lack one. A byte order mark at the
    /// start is left out. `bar` follows.
    ///
    /// # Errors
    /// Those of `each`; Data if the text cannot be read, is not UTF-8, or has a line that is too long.
    pub fn for_each_chunk(&self, bar: &ProgressBar, each: impl FnMut(&str, u64) -> Result<()>) -> Result<u64> {
        self.read(bar, |reader| self.chunks(reader, each))
    }

    /// Gives the text's bytes to `work`.
    fn read<T>(&self, bar: &ProgressBar, work: impl FnOnce(&mut dyn Read) -> Result<T>) -> Result<T> {
        match self {
            Self::Made(_, text) => work(&mut bar.wrap_read(text.as_bytes())),
            Self::File(path, packing) => {
                let file = bar.wrap_read(File::open(path).map_err(|e| Error::read(path, e))?);
                match packing {
                    Packing::Plain => work(&mut { file }),
                    Packing::Gzip => work(&mut MultiGzDecoder::new(file)),
                    Packing::Zstd => work(&mut zstd::Decoder::new(file).map_err(|e| self.unreadable(e))?),
                }
            }
            Self::Entry { archive, name } => {
                let mut zip = open_zip(archive)?;
                // The library holds the entry to its CRC and to no more than its declared size.
                let mut entry = bar.wrap_read(zip.by_name(name).map_err(|e| self.unreadable(e))?);
                work(&mut entry)
            }
        }
    }

    fn chunks(&self, reader: &mut dyn Read, mut each: impl FnMut(&str, u64) -> Result<()>) -> Result<u64> {
        let mut buffer = Vec::new();
        // Bytes of the text before the buffer, and those that were passed on.
        let (mut before, mut passed) = (0, 0);
        loop {
            let held = buffer.len();
            let read = (&mut *reader).take(CHUNK).read_to_end(&mut buffer);
            let read = read.map_err(|e| self.unreadable(e))?;
            let end = match buffer[held..].iter().rposition(|&byte| byte == b'\n') {
                _ if read == 0 => buffer.len(),
                Some(newline) => held + newline + 1,
                None if buffer.len() as u64 > MAX_LINE => {
                    return Err(
                        self.unreadable(format!("a line has more than {MAX_LINE} bytes; break it into several"))
                    );
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
            let text = if before == 0 { text.strip_prefix(MARK).unwrap_or(text) } else { text };
            if !text.is_empty() {
                each(text, before + (end - text.len()) as u64)?;
            }
            passed += text.len() as u64;
            before += end as u64;
            if read == 0 {
                return Ok(passed);
            }
            buffer.drain(..end);
        }
    }

    fn unreadable(&self, reason: impl Display) -> anyhow::Error {
        Error::Data(format!("cannot read {self}: {reason}")).into()
    }
}

impl Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Made(split, _) => write!(f, "the sample's {split} split"),
            Self::File(path, _) => path.display().fmt(f),
            Self::Entry { archive, name } => write!(f, "{name} in {}", archive.display()),
        }
    }
}
