//! Where the value that an error is about was written: in the file, or in a `--set`.

use std::fmt::{self, Display};
use std::path::Path;

use super::usage;
use crate::error::Result;

/// What an error is about: the link of its chain before the reason.
#[derive(Debug)]
pub enum About {
    /// A key, written as `optim.lr`.
    Key(String),
    /// What should be a key.
    UnknownKey(String),
    /// A `--set` that cannot be read.
    Set(String),
}

impl Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => f.write_str(key),
            Self::UnknownKey(key) => write!(f, "unknown key `{key}`"),
            Self::Set(item) => write!(f, "--set {item}"),
        }
    }
}

/// A usage error that reads `ABOUT: REASON`.
pub fn wrong<T>(about: About, reason: String) -> Result<T> {
    usage(reason).map_err(|e| e.context(about))
}

/// Puts the place before an error of a configuration: the `--set` that gave the value, or else the file.
pub fn in_place(error: anyhow::Error, path: &Path, overrides: &[String]) -> anyhow::Error {
    let item = match error.downcast_ref() {
        Some(About::Set(_)) => return error,
        Some(About::Key(key) | About::UnknownKey(key)) => set_of(key, overrides),
        None => None,
    };
    let place = item.map_or_else(|| path.display().to_string(), |item| format!("--set {item}"));
    error.context(format!("in {place}"))
}

/// The last override of a key, of its section, or of a key in it.
pub fn set_of<'a>(key: &str, overrides: &'a [String]) -> Option<&'a String> {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'));
    overrides.iter().rev().find(|item| {
        let name = item.split('=').next().unwrap_or_default();
        name == key || within(name, key) || within(key, name)
    })
}
