//! What the program says of itself: versions, man pages, shell completions.

use std::ffi::OsStr;

use clap::{Command, CommandFactory, FromArgMatches};
use clap_mangen::Man;

use super::args::Cli;
use super::print;
use crate::comm;
use crate::error::{Error, Result, EXIT_CODES};
use crate::torch;

/// Reads the command line. Only whoever asks for `--version` waits until the libraries have been asked for theirs.
///
/// # Errors
/// clap's, which are also how it prints help and versions.
pub fn parse() -> std::result::Result<Cli, clap::Error> {
    let mut command = Cli::command();
    if std::env::args_os().any(|word| word == OsStr::new("--version")) {
        command = command.long_version(versions());
    }
    Cli::from_arg_matches(&command.try_get_matches()?)
}

/// The versions of this program and of the libraries that it finds. None of them is initialised.
fn versions() -> String {
    let cuda = torch::libtorch_cuda().unwrap_or_else(|| "none: this LibTorch is for CPUs".into());
    let comm::Versions { mpi, nccl } = comm::versions();
    let mpi = mpi.unwrap_or_else(|| "none: built without".into());
    let nccl = nccl.unwrap_or_else(|_| "none found".into());
    let [own, libtorch] = [env!("CARGO_PKG_VERSION").into(), torch::libtorch_version()];
    format!("{own}\nLibTorch {libtorch}\nCUDA {cuda}\nMPI {mpi}\nNCCL {nccl}")
}

/// Prints the man page of the program, or of a verb.
pub fn man(verb: &[String]) -> Result<()> {
    let mut program = Cli::command();
    program.build();
    let mut page = &program;
    for name in verb {
        let inner = page.find_subcommand(name);
        page = inner.ok_or_else(|| {
            let known: Vec<&str> = page.get_subcommands().map(Command::get_name).collect();
            Error::Usage(format!("man {}: there is no such verb; there are {}", verb.join(" "), known.join(", ")))
        })?;
    }
    let mut roff = Vec::new();
    let page = Man::new(page.clone().disable_help_subcommand(true));
    page.source(concat!("lockstep ", env!("CARGO_PKG_VERSION"))).render(&mut roff)?;
    if verb.is_empty() {
        roff.extend(b".SH \"EXIT STATUS\"\n");
        for row in &EXIT_CODES {
            roff.extend(format!(".TP\n{}\n{}\n", row.code, row.meaning.replace('-', "\\-")).bytes());
        }
    }
    print::text(&String::from_utf8_lossy(&roff))
}

/// Prints the completions of a shell.
pub fn completions(shell: clap_complete::Shell) -> Result<()> {
    // Into memory first: the generator panics if its output cannot be written.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "lockstep", &mut script);
    print::text(&String::from_utf8_lossy(&script))
}
