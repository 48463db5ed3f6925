//! Log lines: on stderr, and in a rank's own file.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing::Metadata;
use tracing_subscriber::filter::{filter_fn, FilterExt};
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::prelude::*;

use super::args::{Cli, LogFormat};
use crate::host;

/// Marks what `main` says on stderr anyway.
pub const LOG_FILE_ONLY: &str = "log-file-only";

/// Log lines on stderr, and in `file` if one is given, which gets its lines however quiet stderr is to be. Ranks other than 0
/// put warnings only on stderr, and without `-v` they begin no file before their first warning: a job of thousands of ranks
/// would leave as many files that say the same.
///
/// An event's fields are for JSON; its message tells people the same.
pub fn start(cli: &Cli, file: Option<&Path>, root: bool) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::WARN,
        (_, 0) => LevelFilter::INFO,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    if cli.quiet || cli.log_format == LogFormat::Json {
        host::show_no_bars();
    }
    let shown = if root { level } else { LevelFilter::WARN };
    let shown = shown.and(filter_fn(|metadata| metadata.target() != LOG_FILE_ONLY));
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false);
    let mut layers = vec![match cli.log_format {
        LogFormat::Text => {
            let layer = layer.fmt_fields(format::debug_fn(message_only)).with_ansi(has_colours());
            layer.with_timer(UtcTime).with_filter(shown).boxed()
        }
        LogFormat::Json => layer.json().flatten_event(true).with_filter(shown).boxed(),
    }];
    if let Some(path) = file {
        let layer = tracing_subscriber::fmt::layer().fmt_fields(format::debug_fn(message_only));
        let layer = layer.with_ansi(false).with_target(false).with_timer(UtcTime);
        let level = level.max(LevelFilter::INFO);
        let begins_with = if root || cli.verbose > 0 { level } else { LevelFilter::WARN };
        let log = RankLog { path: path.to_path_buf(), begins_with };
        // First, since whoever reads stderr may have stopped.
        layers.insert(0, layer.with_writer(log).with_filter(level).boxed());
    }
    let _ = tracing_subscriber::registry().with(layers).try_init();
}

fn message_only(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> std::fmt::Result {
    if field.name() == "message" {
        write!(writer, "{value:?}")
    } else {
        Ok(())
    }
}

/// Whether stderr shows colours. A variable NO_COLOR that is not empty forbids them: <https://no-color.org>.
fn has_colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The options that give another `lockstep` the log of this one.
pub fn options(cli: &Cli) -> Vec<&'static str> {
    let mut options = vec!["-v"; cli.verbose.into()];
    options.extend(cli.quiet.then_some("-q"));
    options.extend((cli.log_format == LogFormat::Json).then_some("--log-format=json"));
    options
}

/// A rank's log file, opened anew for each line.
struct RankLog {
    path: PathBuf,
    /// What may make the file. Once it is there, also by an earlier start, it gets all lines: they tell where its errors end.
    begins_with: LevelFilter,
}

impl RankLog {
    fn open(&self, begins: bool) -> LogFile {
        // A link could lead out of the run directory.
        let linked = self.path.is_symlink() || self.path.parent().is_some_and(Path::is_symlink);
        let open = || File::options().create(begins).append(true).open(&self.path).ok();
        LogFile(if linked { None } else { open() })
    }
}

impl<'a> MakeWriter<'a> for RankLog {
    type Writer = LogFile;

    fn make_writer(&'a self) -> LogFile {
        self.open(true)
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> LogFile {
        self.open(*metadata.level() <= self.begins_with)
    }
}

/// What is said before the run directory exists, or if it cannot be written, is dropped here: stderr has it, and whoever
/// writes the run's files next fails with the right exit code.
struct LogFile(Option<File>);

impl Write for LogFile {
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
