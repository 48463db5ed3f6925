//! Kernels of our own, compiled by NVRTC for one kind of GPU, and kept in the user's cache folder.

use std::env;
use std::ffi::{c_char, CString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaModule};
use cudarc::nvrtc::{result as calls, sys, Ptx};
use sha2::{Digest, Sha256};
use tracing::debug;

use super::cuda::nvrtc_version;
use crate::files::hex;

const SOURCE: &str = include_str!("kernels.cu");

/// The kernels for GPUs of this compute capability, from the cache or else from the compiler.
pub(super) fn load_module(context: &Arc<CudaContext>, capability: i32) -> Result<Arc<CudaModule>, String> {
    let version = nvrtc_version()?;
    let name = Sha256::digest(format!("{version} {capability} {SOURCE}"));
    let path = cache().map(|folder| folder.join(format!("kernels-{}.cubin", hex(&name))));
    let load = |code: Vec<u8>| context.load_module(Ptx::from_binary(code)).map_err(|e| format!("loading kernels: {e}"));
    if let Some(code) = path.as_ref().and_then(|path| cached(path)) {
        match load(code) {
            Ok(module) => return Ok(module),
            Err(reason) => debug!("kernels of the cache are compiled again: {reason}"),
        }
    }
    let unknown = || format!("NVRTC {version} knows no GPUs of compute capability {capability}");
    let Compiled { code, .. } = compile(capability)?.ok_or_else(unknown)?;
    if let Some(path) = path {
        if let Err(error) = keep(&path, &code) {
            debug!("kernels are not kept for the next start: {}: {error}", path.display());
        }
    }
    load(code)
}

/// Where this user's programs keep what can be made again; `None` if the user has no such place.
fn cache() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(folder.join("lockstep"))
}

/// Bytes of a SHA-256, which ends a file of the cache.
const DIGEST: usize = 32;

/// What [`keep`] kept, if all of it is there.
fn cached(path: &Path) -> Option<Vec<u8>> {
    let mut code = fs::read(path).ok()?;
    let digest = code.split_off(code.len().checked_sub(DIGEST)?);
    (Sha256::digest(&code)[..] == digest).then_some(code)
}

/// Puts a file into the cache: whole or not at all, whoever else does so at the same time.
fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut file, &[code, &Sha256::digest(code)].concat())?;
    file.persist(path)?;
    Ok(())
}

/// What the compiler made of the kernels.
pub struct Compiled {
    /// The GPU's machine code, a cubin.
    pub code: Vec<u8>,
    /// Bytes of registers that threads have to keep in memory, over all kernels: 0 if they are as they should be.
    pub spilled: usize,
}

/// Compiles the kernels for GPUs of this compute capability (90 is the H100's); `None` if this NVRTC is too old, or too new,
/// for such GPUs.
///
/// # Errors
/// That there is no NVRTC; its own words.
pub fn compile(capability: i32) -> Result<Option<Compiled>, String> {
    nvrtc_version()?;
    let mut known = 0;
    // SAFETY: writes one number.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut known) }.result().map_err(|e| e.to_string())?;
    let mut capabilities = vec![0; usize::try_from(known).unwrap_or(0)];
    // SAFETY: writes as many numbers as it has just said.
    unsafe { sys::nvrtcGetSupportedArchs(capabilities.as_mut_ptr()) }.result().map_err(|e| e.to_string())?;
    if !capabilities.contains(&capability) {
        return Ok(None);
    }
    let source = CString::new(SOURCE).map_err(|e| e.to_string())?;
    let program = Program(calls::create_program(&source, Some(c"kernels.cu")).map_err(|e| e.to_string())?);
    let options = [&format!("--gpu-architecture=sm_{capability}"), "--std=c++17", "--ptxas-options=-v"];
    // SAFETY: the program was created above and lives to the end of this function.
    let done = unsafe { calls::compile_program(program.0, &options) };
    // SAFETY: as above; a program that was not compiled has a log, too.
    let log = unsafe { calls::get_program_log(program.0) }.map_err(|e| e.to_string())?;
    let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_string();
    done.map_err(|e| format!("{e}: {}", log.replace('\n', " ")))?;
    let mut bytes = 0;
    // SAFETY: writes the size of the code of the program above, which has been compiled.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut bytes) }.result().map_err(|e| e.to_string())?;
    let mut code = vec![0_u8; bytes];
    // SAFETY: writes as many bytes as it has just said.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>()) }.result().map_err(|e| e.to_string())?;
    Ok(Some(Compiled { code, spilled: spilled(&log) }))
}

/// A program of NVRTC's, destroyed with its owner.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created by NVRTC, and is destroyed here only.
        let _ = unsafe { calls::destroy_program(self.0) };
    }
}

/// The bytes that kernels spill, by the assembler's log: "0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads".
fn spilled(log: &str) -> usize {
    let parts = log.split([',', '\n']).filter(|part| part.contains("bytes spill"));
    parts.filter_map(|part| part.split_whitespace().find_map(|word| word.parse::<usize>().ok())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spills_are_read_from_the_assemblers_log() {
        let line = "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n";
        assert_eq!(spilled(&line.repeat(2)), 40);
        assert_eq!(spilled("ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), 0);
    }

    #[test]
    fn a_file_of_the_cache_is_whole_or_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made/kernels");
        assert_eq!(cached(&path), None);
        keep(&path, b"code").unwrap();
        assert_eq!(cached(&path).as_deref(), Some(&b"code"[..]));
        let whole = fs::read(&path).unwrap();
        for broken in [&b""[..], &whole[..20], &whole[1..], &[&whole[..], b"x"].concat()] {
            fs::write(&path, broken).unwrap();
            assert_eq!(cached(&path), None);
        }
        // What is there is replaced.
        keep(&path, b"other").unwrap();
        assert_eq!(cached(&path).as_deref(), Some(&b"other"[..]));
        assert!(keep(Path::new("/proc/no/kernels"), b"code").is_err());
    }
}
