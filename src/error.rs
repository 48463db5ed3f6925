//! Error classes and the exit code of each.
//!
//! Every function returns [`Result`]; whoever knows what a failure means for the user wraps it in an
//! [`Error`], whose class decides the exit code by one table, [`EXIT_CODES`]. A message says what was
//! expected, what was found, where, and what to do.

use std::fmt::Display;
use std::io::Write;
use std::mem::discriminant;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{json, Value};

/// A result whose error is a chain; the class is the first [`Error`] found in it.
pub type Result<T> = anyhow::Result<T>;

/// What kind of thing went wrong; each kind is an exit code that scripts may rely on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Exit code 2: a command line or a configuration that cannot be run.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3: text, shards or vocabularies that cannot be used.
    #[error("{0}")]
    Data(String),
    /// Exit code 4: files that cannot be written or checkpoints that cannot be trusted.
    #[error("{0}")]
    Storage(String),
    /// Exit code 4: a job that is started again and again, and never gets to a later checkpoint.
    #[error("{0}")]
    Stuck(String),
    /// Exit code 5: a loss or a gradient that is not finite.
    #[error("{0}")]
    Numbers(String),
    /// Exit code 6: a peer lost, hung or not agreeing.
    #[error("{0}")]
    Communication(String),
    /// Exit code 75: stopped on request with the state saved; start the same command again.
    #[error("{0}")]
    Preempted(String),
}

/// An exit code of the program.
pub struct ExitCode {
    /// The number.
    pub code: u8,
    /// What it means to the user.
    pub meaning: &'static str,
    class: Option<fn(String) -> Error>,
}

/// All exit codes.
pub const EXIT_CODES: [ExitCode; 10] = [
    ExitCode { code: 0, meaning: "done", class: None },
    ExitCode { code: 1, meaning: "a defect of Lockstep itself: please report it", class: None },
    ExitCode {
        code: 2,
        meaning: "usage: a command line, a configuration or a machine that cannot run this",
        class: Some(Error::Usage),
    },
    ExitCode {
        code: 3,
        meaning: "data: text, token files or vocabularies that cannot be used",
        class: Some(Error::Data),
    },
    ExitCode {
        code: 4,
        meaning:
            "storage: a file that cannot be written, a checkpoint that cannot be trusted, restarts that lead nowhere",
        class: Some(Error::Storage),
    },
    ExitCode { code: 5, meaning: "numbers: a loss or a gradient that is not finite", class: Some(Error::Numbers) },
    ExitCode {
        code: 6,
        meaning: "communication: a rank is lost, hangs, or does not agree with the others",
        class: Some(Error::Communication),
    },
    ExitCode {
        code: 75,
        meaning: "stopped on request, the state is saved: start the same command again",
        class: Some(Error::Preempted),
    },
    ExitCode {
        code: 130,
        meaning: "ended at once by Ctrl-C: the second one while training, the first one otherwise",
        class: None,
    },
    ExitCode {
        code: 143,
        meaning: "ended at once by SIGTERM: the second one while training, the first one otherwise",
        class: None,
    },
];

impl ExitCode {
    /// The first word of the meaning, but for a request to stop.
    fn class_name(&self) -> &'static str {
        match self.code {
            1 => "defect",
            75 => "stopped",
            _ => self.meaning.split(':').next().unwrap_or_default(),
        }
    }
}

impl Error {
    /// A data error (exit 3) about a file: "cannot read PATH: REASON".
    pub fn read(path: &Path, reason: impl Display) -> anyhow::Error {
        Self::Data(format!("cannot read {}: {reason}", path.display())).into()
    }

    /// A storage error (exit 4) about a file: "cannot write PATH: REASON", with the remedy for that reason.
    pub fn write(path: &Path, reason: impl Display) -> anyhow::Error {
        let reason = reason.to_string();
        let remedy = match &reason {
            quota if quota.contains("quota exceeded") => "remove files of yours, ask for a larger quota,",
            limit if limit.contains("File too large") => {
                "raise the limit on a file's size (`ulimit -f` shows it), ask for a larger one,"
            }
            disk if disk.contains("Input/output error") => "have the disk or the file server looked at",
            _ => "free space",
        };
        let path = path.display();
        Self::Storage(format!("cannot write {path}: {reason}; {remedy} or name a folder that you may write to")).into()
    }

    /// A usage error (exit 2): the system gives no thread.
    pub fn thread(reason: impl Display) -> anyhow::Error {
        Self::Usage(format!(
            "this machine gives the program no more threads ({reason}); raise the limit on processes (`ulimit -u` shows \
             it), or use fewer threads (OMP_NUM_THREADS)"
        ))
        .into()
    }

    /// The error of a child process that ended with this code: of the same class, so that this process ends with it,
    /// too.
    pub fn with_code(code: i32, message: String) -> anyhow::Error {
        let class = EXIT_CODES.iter().find(|row| i32::from(row.code) == code).and_then(|row| row.class);
        match class {
            Some(class) => class(message).into(),
            None => anyhow::anyhow!(message),
        }
    }

    fn code(&self) -> u8 {
        if let Self::Stuck(_) = self {
            return 4;
        }
        let is_of = |class: fn(String) -> Self| discriminant(&class(String::new())) == discriminant(self);
        EXIT_CODES.iter().find(|row| row.class.is_some_and(is_of)).map_or(1, |row| row.code)
    }
}

/// The process's exit code for an error chain; 1 if no link of it has a class, which is a defect.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(|link| link.downcast_ref::<Error>()).map_or(1, Error::code)
}

static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Lets [`tell`] and [`tell_end`] speak JSON from now on, one object a line, as the log does.
pub fn tell_as_json() {
    AS_JSON.store(true, Ordering::Relaxed);
}

/// Says on stderr, in one line, what becomes of this process. Not `eprintln!`, which panics if nobody reads stderr any more.
pub fn tell(reason: &str) {
    let line = match AS_JSON.load(Ordering::Relaxed) {
        true => object(reason).to_string(),
        false => format!("lockstep: {reason}"),
    };
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says as [`tell`] with which error this process ends: the whole of it, or one rank of several. JSON also has the exit code
/// and its class.
pub fn tell_end(error: &anyhow::Error, rank: Option<usize>) {
    let reason = format!("{error:#}");
    if AS_JSON.load(Ordering::Relaxed) {
        let code = exit_code(error);
        let mut end = object(&reason);
        end["exit_code"] = code.into();
        end["class"] = EXIT_CODES.iter().find(|row| row.code == code).map_or("defect", ExitCode::class_name).into();
        if let Some(rank) = rank {
            end["rank"] = rank.into();
        }
        let _ = writeln!(std::io::stderr(), "{end}");
    } else {
        tell(&rank.map_or(reason.clone(), |rank| format!("rank {rank}: {reason}")));
    }
}

/// A line of the log as JSON.
fn object(message: &str) -> Value {
    json!({"timestamp": format!("{:.6}", jiff::Timestamp::now()), "level": "ERROR", "message": message})
}

/// What a panic becomes: tch reports LibTorch's errors so. Memory is the one that a user can do something about.
pub fn from_panic(panic: &(dyn std::any::Any + Send)) -> anyhow::Error {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
    if text.contains("can't allocate memory") || text.contains("out of memory") {
        // tch escapes the ends of lines; the first line says it all, the others are LibTorch's stack.
        let first = text.split("\\n").flat_map(str::lines).find(|line| line.contains("memory")).unwrap_or_default();
        let reason = first.rsplit(['"', ']']).next().unwrap_or_default().trim();
        return Error::Usage(format!(
            "there is not enough memory ({reason}); use a smaller data.micro_batch or model, or model.recompute: true"
        ))
        .into();
    }
    anyhow::anyhow!("internal error, please report it: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_and_its_class_belong_together() {
        for code in [1, 2, 3, 4, 5, 6, 75] {
            assert_eq!(exit_code(&Error::with_code(i32::from(code), "m".into())), code);
        }
    }
}
