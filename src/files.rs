//! Files that are whole or absent, and what names their content.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
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
