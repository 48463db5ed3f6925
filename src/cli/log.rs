//! Log lines: on stderr, and in a rank's own file.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{filter_fn, FilterExt};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::prelude::*;

use super::args::{Cli, LogFormat};

/// Marks what `main` says on stderr anyway.
pub const LOG_FILE_ONLY: &str = "log-file-only";

/// Log lines on stderr, and in `file` if one is given. Ranks other than 0 put warnings only on stderr.
pub fn start(cli: &Cli, file: Option<&Path>, root: bool) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::WARN,
        (_, 0) => LevelFilter::INFO,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let shown = if root { level } else { LevelFilter::WARN };
    let shown = shown.and(filter_fn(|metadata| metadata.target() != LOG_FILE_ONLY));
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false);
    let mut layers = vec![match cli.log_format {
        LogFormat::Text => layer.with_ansi(io::stderr().is_terminal()).with_timer(UtcTime).with_filter(shown).boxed(),
        LogFormat::Json => layer.json().with_filter(shown).boxed(),
    }];
    if let Some(path) = file {
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false).with_timer(UtcTime);
        let path = path.to_path_buf();
        // First, since whoever reads stderr may have stopped.
        layers.insert(0, layer.with_writer(move || RankLog::open(&path)).with_filter(level).boxed());
    }
    let _ = tracing_subscriber::registry().with(layers).try_init();
}

/// The options that give another `lockstep` the log of this one.
pub fn options(cli: &Cli) -> Vec<&'static str> {
    let mut options = vec!["-v"; cli.verbose.into()];
    options.extend(cli.quiet.then_some("-q"));
    options.extend((cli.log_format == LogFormat::Json).then_some("--log-format=json"));
    options
}

/// A rank's log file. What is said before the run directory exists, or if it cannot be written, is dropped here: stderr
/// has it, and whoever writes the run's files next fails with the right exit code.
struct RankLog(Option<File>);

impl RankLog {
    fn open(path: &Path) -> Self {
        // A link could lead out of the run directory.
        let linked = path.is_symlink() || path.parent().is_some_and(Path::is_symlink);
        Self(if linked { None } else { File::options().create(true).append(true).open(path).ok() })
    }
}

impl Write for RankLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.as_mut().map_or(Ok(bytes.len()), |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.as_mut().map_or(Ok(()), File::flush)
    }
}

/// Seconds' resolution is enough for people; the CSVs have the exact times.
struct UtcTime;

impl FormatTime for UtcTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        write!(writer, "{}", jiff::Timestamp::now().strftime("%H:%M:%SZ"))
    }
}
