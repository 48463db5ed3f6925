//! The one error exit: whatever goes wrong becomes a line on stderr and an exit code here.

use std::process::ExitCode;

use lockstep::cli::manual;
use lockstep::{cli, error};

fn main() -> ExitCode {
    // The message of a panic is printed below, as any other error's.
    std::panic::set_hook(Box::new(|_| {}));
    let arguments = manual::parse().unwrap_or_else(|refusal| refuse(&refusal));
    let done = std::panic::catch_unwind(|| cli::run(&arguments));
    match done.unwrap_or_else(|panic| Err(error::from_panic(panic.as_ref()))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error::tell_end(&error, None);
            ExitCode::from(error::exit_code(&error))
        }
    }
}

/// Ends as clap does: with help on standard output, or a complaint on standard error.
fn refuse(refusal: &clap::Error) -> ! {
    let words: Vec<_> = std::env::args_os().collect();
    let as_json = words.iter().any(|word| word == "--log-format=json")
        || words.windows(2).any(|pair| pair[0] == "--log-format" && pair[1] == "json");
    if as_json && refusal.use_stderr() {
        error::tell_as_json();
        let text = refusal.render().to_string();
        let reason = text.trim().trim_start_matches("error: ").to_owned();
        error::tell_end(&error::Error::Usage(reason).into(), None);
        std::process::exit(refusal.exit_code());
    }
    refusal.exit()
}
