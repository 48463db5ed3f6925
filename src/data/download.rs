//! Downloads one file: resumed where it was cut, verified by its SHA-256 before anything reads it.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ureq::http::header::{CONTENT_RANGE, RANGE};
use ureq::http::Uri;
use ureq::{Agent, Proxy};

use crate::error::{Error, Result};
use crate::files;

/// Attempts in a row that may fail without much progress.
const ATTEMPTS: u32 = 5;
/// An attempt that brought this much is not counted as a failure.
const PROGRESS: u64 = 1 << 20;
/// The largest published archive has 192 MB; a server that sends more sends something else.
const MAX_SIZE: u64 = 512 << 20;

/// Why an attempt ended before the file did.
enum Failure {
    /// Worth another attempt: a cut connection, a server too busy.
    Passing(String),
    /// The same in every attempt.
    Final(anyhow::Error),
}

/// Makes sure that the file `to` is there with this SHA-256 (lower-case hexadecimal digits).
///
/// What has arrived is kept in `TO.part`, so the next call resumes if the server supports ranges;
/// a file whose checksum is wrong is removed.
///
/// # Errors
/// Data if the file cannot be had or is another one, Storage if it cannot be written.
pub fn fetch(url: &str, sha256: &str, to: &Path) -> Result<()> {
    if to.exists() && sha256_of(to)? == sha256 {
        return Ok(());
    }
    let folder = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
    let mut part = to.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let received = receive(url, sha256, &part);
    if received.is_err() && size_of(&part) == 0 {
        // Nothing to resume from: leave no empty file, and no folder that holds nothing else.
        let _ = fs::remove_file(&part);
        let _ = fs::remove_dir(folder);
    }
    received?;
    fs::rename(&part, to).map_err(|e| Error::write(to, e))
}

/// Completes `part` in as many attempts as it takes and verifies it.
fn receive(url: &str, sha256: &str, part: &Path) -> Result<()> {
    tracing::info!("downloading {url}");
    let agent: Agent = Agent::config_builder()
        .user_agent(concat!("lockstep/", env!("CARGO_PKG_VERSION")))
        // A compressed answer would make nonsense of ranges and sizes.
        .accept_encoding("identity")
        .http_status_as_error(false)
        .proxy(if is_here(url) { None } else { Proxy::try_from_env() })
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build()
        .into();
    let bar = byte_bar("download", 0);
    let mut failures = 0;
    loop {
        let had = size_of(part);
        let reason = match attempt(&agent, url, part, &bar) {
            Ok(()) => break,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(reason)) => reason,
        };
        let has = size_of(part);
        failures = if has >= had + PROGRESS { 1 } else { failures + 1 };
        if failures == ATTEMPTS {
            let kept = match has {
                0 => "nothing has arrived".to_owned(),
                _ => format!("{has} bytes are kept in {} and the same command resumes", part.display()),
            };
            return Err(Error::Data(format!(
                "cannot download {url}: {reason}, {ATTEMPTS} times in a row; {kept}. Without a network, fetch \
                 the archive elsewhere, unpack it and name its folder with --source; another server is \
                 named with --url"
            ))
            .into());
        }
        let pause = Duration::from_millis(250 << failures);
        tracing::warn!("{url}: {reason} after {has} bytes; trying again in {pause:?}");
        std::thread::sleep(pause);
    }
    bar.finish_and_clear();

    let found = sha256_of(part)?;
    if found != sha256 {
        let size = size_of(part);
        fs::remove_file(part).map_err(|e| Error::write(part, e))?;
        return Err(Error::Data(format!(
            "{url}: expected SHA-256 {sha256}, found {found} ({size} bytes, now removed); run the command \
             again, and if the error stays, name another server with --url"
        ))
        .into());
    }
    Ok(())
}

/// Whether the address is this machine's own, which no proxy elsewhere can reach.
fn is_here(url: &str) -> bool {
    let host = url.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
    host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// One request for what is missing of `part`.
fn attempt(agent: &Agent, url: &str, part: &Path, bar: &ProgressBar) -> std::result::Result<(), Failure> {
    let unwritable = |e| Failure::Final(Error::write(part, e));
    let have = size_of(part);
    let mut request = agent.get(url);
    if have > 0 {
        request = request.header(RANGE, format!("bytes={have}-"));
    }
    let mut response = request.call().map_err(|e| match e {
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
            Failure::Final(Error::Usage(format!("--url {url}: expected an http or https address: {e}")).into())
        }
        _ => Failure::Passing(e.to_string()),
    })?;
    let mut file = OpenOptions::new().append(true).create(true).open(part).map_err(unwritable)?;
    let ranged = response.headers().get(CONTENT_RANGE);
    let ranged = ranged.and_then(|value| value.to_str().ok());
    let start = match response.status().as_u16() {
        206 if ranged.is_some_and(|range| range.starts_with(&format!("bytes {have}-"))) => have,
        // The whole file, or a range that nobody asked for: both start afresh.
        status @ (200 | 206) => {
            file.set_len(0).map_err(unwritable)?;
            if status == 206 {
                return Err(Failure::Passing("another range than asked for".to_owned()));
            }
            0
        }
        // There is nothing beyond what is here; the checksum tells whether that is the file.
        416 if have > 0 => return Ok(()),
        status @ (408 | 429 | 500..) => return Err(Failure::Passing(format!("status {status} of the server"))),
        status => {
            return Err(Failure::Final(
                Error::Data(format!(
                    "cannot download {url}: expected status 200, found {status}; name another server with \
                     --url, or fetch the archive elsewhere, unpack it and name its folder with --source"
                ))
                .into(),
            ))
        }
    };
    let total = response.body().content_length().map(|rest| start + rest);
    bar.set_length(total.unwrap_or(0));
    bar.set_position(start);

    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 1 << 16];
    let mut written = start;
    loop {
        let read = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) => return Err(Failure::Passing(e.to_string())),
        };
        written += read as u64;
        if written > MAX_SIZE {
            file.set_len(0).map_err(unwritable)?;
            return Err(Failure::Final(
                Error::Data(format!(
                    "{url}: expected at most {MAX_SIZE} bytes, found more; this is no WikiText archive, name \
                     another server with --url"
                ))
                .into(),
            ));
        }
        file.write_all(&buffer[..read]).map_err(unwritable)?;
        bar.set_position(written);
    }
    if total.is_some_and(|total| written < total) {
        return Err(Failure::Passing("the connection was cut".to_owned()));
    }
    file.sync_all().map_err(unwritable)
}

/// A file's size; a file that is not there has none of it.
fn size_of(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

/// SHA-256 of a file in lower-case hexadecimal digits.
///
/// # Errors
/// Data, if the file cannot be read.
pub(super) fn sha256_of(path: &Path) -> Result<String> {
    files::digest(path).map(|(_, sha256)| sha256).map_err(|e| Error::read(path, e))
}

/// A progress bar in bytes on stderr, visible on terminals only.
pub(super) fn byte_bar(label: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:8} {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
    );
    ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(label)
}
