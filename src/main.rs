//! The one error exit: whatever goes wrong becomes a line on stderr and an exit code here.

use std::process::ExitCode;

use clap::Parser;
use lockstep::cli::args::Cli;
use lockstep::{cli, error};

fn main() -> ExitCode {
    // The message of a panic is printed below, as any other error's.
    std::panic::set_hook(Box::new(|_| {}));
    let arguments = Cli::parse();
    let done = std::panic::catch_unwind(|| cli::run(&arguments));
    match done.unwrap_or_else(|panic| Err(error::from_panic(panic.as_ref()))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error::tell(&format!("{error:#}"));
            ExitCode::from(error::exit_code(&error))
        }
    }
}
