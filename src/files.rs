//! Files and folders that are whole or absent, and what names their content.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use signal_hook::consts::SIGXFSZ;
use signal_hook::flag;

use crate::error::{Error, Result};

/// Makes a write beyond the limit on a file's size (`ulimit -f`) an error, as any other that fails. Else the system ends the
/// process, without a word.
///
/// # Errors
/// Usage, if the system refuses signal handlers.
pub fn make_limits_errors() -> Result<()> {
    // Whether it came does not matter: the write fails, and whoever wrote says what.
    let noted = flag::register(SIGXFSZ, Arc::default());
    noted.map(drop).map_err(|e| Error::Usage(format!("cannot handle signals: {e}")).into())
}

/// Gives a file this content: under another name first, made durable, and renamed, so that whatever happens, the old
/// content or the new is there whole, and after the return the new. A file that has it already is left alone.
///
/// # Errors
/// Storage, if the file cannot be written.
pub fn write_durably(path: &Path, content: &[u8]) -> Result<()> {
    // A link is replaced, whatever it leads to: nothing is written outside of the folder.
    if !path.is_symlink() && fs::read(path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let write = || {
        if Path::new(&temporary).is_symlink() {
            fs::remove_file(&temporary)?;
        }
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_name(path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::write(path, e)
    })
}

/// Makes the name of a file or folder durable, which is an entry of the folder above.
///
/// # Errors
/// The system's, if that folder cannot be opened or synchronised.
pub fn sync_name(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// The size of a file and the SHA-256 of its content, in constant memory.
///
/// # Errors
/// The system's, if the file cannot be read.
pub fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((size, hex(&sha256.finalize())));
        }
        sha256.update(&buffer[..n]);
        size += n as u64;
    }
}

/// Bytes as lower-case hexadecimal digits, the way checksums are written.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The path with an ending added to its last name.
pub fn sibling(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// `out` as an absolute path without links, its parent made: a link to another disk stays a link, and
/// what it points to is replaced.
///
/// # Errors
/// Usage, if it names no folder; storage, if its parent cannot be made.
pub fn resolve(out: &Path) -> Result<PathBuf> {
    if out.exists() {
        return out.canonicalize().map_err(|e| Error::write(out, e));
    }
    let name =
        out.file_name().ok_or_else(|| Error::Usage(format!("--out {}: expected a folder's name", out.display())))?;
    let parent = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent)
        .and_then(|()| parent.canonicalize())
        .map(|parent| parent.join(name))
        .map_err(|e| Error::write(out, e))
}

/// As [`resolve`], for a folder that must not exist yet.
///
/// # Errors
/// As [`resolve`]; usage, if something is there.
pub fn resolve_new(out: &Path) -> Result<PathBuf> {
    if out.symlink_metadata().is_ok() {
        let message = "exists already, and nothing was touched; name a new folder, or remove this one first";
        return Err(Error::Usage(format!("--out {}: {message}", out.display())).into());
    }
    resolve(out)
}

/// Writes a file of a folder in the making, durably.
///
/// # Errors
/// Storage, if it cannot be written.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(|e| Error::write(path, e))
}

/// Removes a folder that may not be there.
fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// A folder in the making, beside its place; removed unless it takes that.
pub struct Partial {
    path: PathBuf,
    out: PathBuf,
}

impl Partial {
    /// Starts afresh: what a killed process left under this name is removed.
    ///
    /// # Errors
    /// Storage, if the folder cannot be made.
    pub fn beside(out: &Path) -> Result<Self> {
        let path = sibling(out, ".lockstep-partial");
        remove_folder(&path).and_then(|()| fs::create_dir(&path)).map_err(|e| Error::write(&path, e))?;
        Ok(Self { path, out: out.to_path_buf() })
    }

    /// Removes what this process has made for a place so far, while other threads of it may still write: they find no folder.
    pub fn discard(out: &Path) {
        let (path, gone) = (sibling(out, ".lockstep-partial"), sibling(out, ".lockstep-gone"));
        let _ = fs::rename(path, &gone).and_then(|()| fs::remove_dir_all(gone));
    }

    /// Where it is until then.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the folder to its place; a folder there steps aside first and is removed last.
    ///
    /// # Errors
    /// Storage, if it cannot be renamed.
    pub fn replace(self) -> Result<()> {
        let old = sibling(&self.out, ".lockstep-replaced");
        if !self.out.exists() {
            return self.appear();
        }
        let step_aside = || {
            remove_folder(&old)?;
            fs::rename(&self.out, &old)
        };
        step_aside().map_err(|e| Error::write(&self.out, e))?;
        if let Err(e) = self.rename() {
            fs::rename(&old, &self.out).map_err(|e| Error::write(&self.out, e))?;
            return Err(Error::write(&self.out, e));
        }
        fs::remove_dir_all(&old).map_err(|e| Error::write(&self.out, e))
    }

    /// Renames the folder to its place, where nothing may be.
    ///
    /// # Errors
    /// Storage, if it cannot be renamed.
    pub fn appear(self) -> Result<()> {
        self.rename().map_err(|e| Error::write(&self.out, e))
    }

    fn rename(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        fs::rename(&self.path, &self.out)?;
        sync_name(&self.out)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Gone once it has taken its place; elsewhere an error is on its way that matters more than this one.
        let _ = fs::remove_dir_all(&self.path);
    }
}
