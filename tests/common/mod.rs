//! A test's own folder, with a small data folder and a fast configuration, and ways to run the binary in it.
#![allow(dead_code)] // each test program uses its own part

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tempfile::TempDir;

pub mod alike;
pub mod documents;
pub mod runs;
pub mod zero1;

/// `tiny.yaml`: 256 targets a step, milliseconds each.
pub const TINY: &str = "name: tiny\ndevice: cpu\ndata: {dir: data, block_size: 32, batch_size: 8}\n\
    model: {n_layer: 2, n_head: 2, n_embd: 32}\n\
    train: {steps: 12, eval_every: 4, save_every: 4, sample_every: 6, prompts: [' The river', '']}\n";

/// A folder with `tiny.yaml` and `data/`, the sample under `bpe:512`.
pub struct Workspace {
    folder: TempDir,
}

/// What a command printed and how it ended.
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Workspace {
    pub fn new() -> Self {
        Self::in_folder(tempfile::tempdir().unwrap())
    }

    /// A workspace in an [`in_memory`] folder.
    pub fn in_memory() -> Self {
        Self::in_folder(in_memory())
    }

    fn in_folder(folder: TempDir) -> Self {
        symlink(sample(), folder.path().join("data")).unwrap();
        fs::write(folder.path().join("tiny.yaml"), TINY).unwrap();
        Self { folder }
    }

    /// A finished run of `tiny.yaml` in `run`: a copy, trained once for all tests.
    pub fn trained(&self, run: &str) {
        let tiny = shared("tiny", |folder| {
            let work = Self::new();
            work.train("run", "").ok();
            copy_folder(&work.path("run"), folder);
        });
        copy_folder(&tiny, &self.path(run));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes an executable shell script into the folder.
    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A copy of `data/` that may be damaged.
    pub fn own_data(&self, name: &str) -> PathBuf {
        copy_folder(&self.path("data"), &self.path(name));
        self.path(name)
    }

    /// Runs `lockstep` in the folder with these space-separated arguments.
    #[track_caller]
    pub fn lockstep(&self, arguments: &str) -> Output {
        self.run(&arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// Like [`Self::lockstep`], for arguments that contain spaces.
    #[track_caller]
    pub fn run(&self, arguments: &[impl AsRef<OsStr>]) -> Output {
        finish(self.command(arguments))
    }

    /// Trains `tiny.yaml` into `run`.
    #[track_caller]
    pub fn train(&self, run: &str, more: &str) -> Output {
        self.lockstep(&format!("train --config tiny.yaml --run-dir {run} {more}"))
    }

    /// The command that runs `lockstep` in the folder. If it hangs, it is stopped and fails.
    pub fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new("timeout");
        command.arg("600").arg(binary()).args(arguments);
        command.current_dir(self.folder.path()).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        command
    }

    /// Runs a shell script in the folder, in its own mount namespace: its mounts end with it.
    /// `$lockstep` is the binary. Returns `None`, and says so, if this machine does not permit it.
    pub fn with_mounts(&self, script: &str) -> Option<Output> {
        let unshare = |script: &str| {
            let mut command = Command::new("timeout");
            command.args(["600", "unshare", "--mount"]);
            // Root needs no user namespace; others become root in one.
            if !is_root() {
                command.args(["--user", "--map-root-user"]);
            }
            command.args(["sh", "-c", script]).current_dir(self.folder.path());
            command.env("OMP_NUM_THREADS", "1").env("lockstep", binary()).stdin(Stdio::null());
            command
        };
        fs::create_dir_all(self.path("mnt")).unwrap();
        let permitted = unshare("mount -t tmpfs none mnt").output().is_ok_and(|output| output.status.success());
        if !permitted {
            not_run("mounting a tmpfs in a namespace of its own is not permitted here");
            return None;
        }
        Some(finish(unshare(&format!("set -u; {script}"))))
    }
}

impl Output {
    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// Asserts the exit code and what the message must contain.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}", self.stderr);
        self.says(parts)
    }

    /// Asserts that stdout contains all of these.
    #[track_caller]
    pub fn reports(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.stdout.contains(part), "no {part:?} in\n{}\n{}", self.stdout, self.stderr);
        }
    }

    /// Asserts that stderr contains all of these.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {:?}", self.stderr);
        }
        self
    }
}

pub fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_lockstep")
}

/// Runs a command to its end. No command may ever panic or print a stack.
#[track_caller]
pub fn finish(mut command: Command) -> Output {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    for defect in ["panicked", "internal error", "frame #", "RUST_BACKTRACE"] {
        assert!(!stderr.contains(defect), "{defect:?} in {stderr:?}");
    }
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    Output { code: output.status.code().unwrap_or(-1), stdout, stderr }
}

/// Reports that a test did not run, bypassing the test program's capture.
pub fn not_run(reason: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "NOT RUN: {name}: {reason}");
}

/// A folder that the tests of this process share, made by the first that asks for it. Copy what you want to change.
fn shared(name: &'static str, make: impl FnOnce(&Path)) -> PathBuf {
    static MADE: Mutex<BTreeMap<&str, Arc<OnceLock<PathBuf>>>> = Mutex::new(BTreeMap::new());
    let made = MADE.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default().clone();
    let make = || {
        let folder = session().join(name);
        let _ = fs::remove_dir_all(&folder); // of an attempt that failed
        fs::create_dir_all(&folder).unwrap();
        make(&folder);
        folder
    };
    made.get_or_init(make).clone()
}

/// This process's folder for [`shared`] folders. Nothing runs at the end of a test program, so the next one removes it.
fn session() -> PathBuf {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sessions");
    for entry in fs::read_dir(&all).into_iter().flatten().flatten() {
        if !Path::new("/proc").join(entry.file_name()).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    all.join(std::process::id().to_string())
}

/// A folder in memory, if the machine has one, for what must not wait for a disk: a disk may stall for seconds.
pub fn in_memory() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

/// The data folder of the sample under `bpe:512`.
pub fn sample() -> PathBuf {
    shared("data", |folder| {
        let mut prepare = Command::new(binary());
        prepare.args(["-q", "prepare", "--source", "sample", "--tokenizer", "bpe:512", "--out"]).arg(folder);
        finish(prepare).ok();
    })
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_folder(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// The content of every file below a folder by its relative path, except what every start touches: logs, heartbeats.
pub fn snapshot(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files(folder);
    files.retain(|name, _| !name.starts_with("logs/") && !name.starts_with("heartbeats/"));
    files
}

/// The content of every file below a folder by its relative path.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// A CSV's columns and its rows.
pub fn table(text: &str) -> (Vec<String>, Vec<BTreeMap<String, String>>) {
    assert!(text.ends_with('\n'), "the last row is cut: {text:?}");
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let columns = reader.headers().unwrap().iter().map(String::from).collect();
    (columns, reader.deserialize().map(|row| row.unwrap()).collect())
}

/// The rows of a CSV file, which may be growing, by column.
pub fn rows(path: &Path) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    reader.deserialize().map(|row| row.unwrap()).collect()
}

/// A column of a CSV file as numbers.
pub fn numbers(path: &Path, column: &str) -> Vec<f64> {
    let (_, rows) = table(&fs::read_to_string(path).unwrap());
    rows.iter().map(|row| row[column].parse().unwrap()).collect()
}

/// Changes one bit of one byte of a file.
pub fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}
