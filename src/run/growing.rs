//! A CSV file of a run that goes on, read from outside: what was added since the last look, or its last row only.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::tables::{header, read, Row, Table};
use crate::error::{Error, Result};

/// More than any row takes.
const TAIL: u64 = 1 << 13;

/// The last row of a file, of which no more than the end is read; `None` if it has none.
///
/// # Errors
/// As [`Table::rows`].
pub fn last_row<R: Row>(path: &Path) -> Result<Option<R>> {
    let tail = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        if length <= 2 * TAIL {
            return Ok(None);
        }
        let mut head = vec![0; header::<R>().len()];
        file.read_exact(&mut head)?;
        file.seek(SeekFrom::Start(length - TAIL))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        Ok((head == header::<R>().as_bytes()).then(|| [&head, &b"\n"[..], &bytes[whole..]].concat()))
    });
    // A short file, or one that a spreadsheet saved, is read as a whole; so is one with an error, which has its line there.
    let rows = match tail {
        Ok(Some(bytes)) => read(path, &bytes).map(|(rows, _)| rows).or_else(|_| Table::rows(path))?,
        _ => Table::rows(path)?,
    };
    Ok(rows.into_iter().next_back())
}

/// A file that is read as it grows.
pub struct Growing<R> {
    path: PathBuf,
    /// The file's number, and how far it was read.
    seen: Option<(u64, u64)>,
    rows: PhantomData<R>,
}

impl<R: Row> Growing<R> {
    /// Nothing is read yet; the file need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { path, seen: None, rows: PhantomData }
    }

    /// The rows since the last call, and whether they are all rows: a run that resumes writes its file anew.
    ///
    /// # Errors
    /// As [`Table::rows`]; then the next call begins anew.
    pub fn more(&mut self) -> Result<(bool, Vec<R>)> {
        let before = self.seen.take();
        let read_new = || -> io::Result<(u64, u64, bool, Vec<u8>)> {
            let mut file = File::open(&self.path)?;
            let data = file.metadata()?;
            let from = before.filter(|&(number, read)| number == data.ino() && read <= data.len());
            let start = from.map_or(0, |(_, read)| read);
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok((data.ino(), start, from.is_none(), bytes))
        };
        let (number, start, anew, mut bytes) = match read_new() {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok((before.is_some(), Vec::new())),
            Err(e) => return Err(Error::read(&self.path, e)),
        };
        // The rest of a row is on its way.
        bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        let end = start + bytes.len() as u64;
        let (anew, rows) = match anew {
            true => (true, read(&self.path, &bytes)?.0),
            false => {
                let head = header::<R>() + "\n";
                match read(&self.path, &[head.as_bytes(), &bytes].concat()) {
                    Ok((rows, _)) => (false, rows),
                    // Under a header of another version; or an error, whose line in the whole file is what a person can use.
                    Err(_) => (true, Table::rows(&self.path)?),
                }
            }
        };
        // Before its header, a file is not begun.
        self.seen = (end > 0).then_some((number, end));
        Ok((anew, rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tables::EvalRow;
    use std::fs;
    use std::io::Write;

    fn row(step: usize) -> EvalRow {
        EvalRow { step, split: "valid".into(), loss: 1.5, ppl: 4.5, tokens: 9, ..EvalRow::default() }
    }

    #[test]
    fn each_row_is_read_once_while_the_file_grows_and_all_when_it_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.csv");
        let mut growing = Growing::<EvalRow>::new(path.clone());
        assert_eq!(growing.more().unwrap(), (false, Vec::new()));
        let (mut table, _) = Table::open::<EvalRow>(&path, 0).unwrap();
        let steps = |growing: &mut Growing<EvalRow>| {
            let (anew, rows) = growing.more().unwrap();
            (anew, rows.iter().map(|row| row.step).collect::<Vec<_>>())
        };
        assert_eq!(steps(&mut growing), (true, Vec::new()));
        table.append(&row(1)).unwrap();
        table.append(&row(2)).unwrap();
        assert_eq!(steps(&mut growing), (false, vec![1, 2]));
        assert_eq!(steps(&mut growing), (false, Vec::new()));
        // Half a row is left for later.
        let mut file = fs::File::options().append(true).open(&path).unwrap();
        file.write_all(b"3,val").unwrap();
        assert_eq!(steps(&mut growing), (false, Vec::new()));
        drop(Table::open::<EvalRow>(&path, 1).unwrap());
        assert_eq!(steps(&mut growing), (true, vec![1]));
        fs::remove_file(&path).unwrap();
        assert_eq!(steps(&mut growing), (true, Vec::new()));
    }

    #[test]
    fn the_last_row_of_a_long_file_is_that_of_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.csv");
        assert_eq!(last_row::<EvalRow>(&path).unwrap(), None);
        let (mut table, _) = Table::open::<EvalRow>(&path, 0).unwrap();
        for step in 1..=1000 {
            table.append(&row(step)).unwrap();
            if [1, 1000].contains(&step) {
                assert_eq!(last_row::<EvalRow>(&path).unwrap().unwrap().step, step);
            }
        }
        assert!(fs::metadata(&path).unwrap().len() > 2 * TAIL);
        let mut file = fs::File::options().append(true).open(&path).unwrap();
        file.write_all(b"1001,val").unwrap();
        assert_eq!(last_row::<EvalRow>(&path).unwrap().unwrap().step, 1000);
        file.write_all(b"\n1002,valid,x\n").unwrap();
        let error = last_row::<EvalRow>(&path).unwrap_err().to_string();
        assert!(error.contains("line 1002"), "{error}");
    }
}
