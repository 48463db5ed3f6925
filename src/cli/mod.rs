//! The command line: [`args`] has its types, and each verb ends in a call of the room that does it.

pub mod args;
mod checkpoint;
mod config;
mod inference;
mod interop;
mod log;
pub mod manual;
mod print;
mod tokenize;

use std::path::Path;
use std::time::Duration;

use self::args::{CheckpointAction, Cli, DeviceName, DocumentName, LogFormat, Verb};
use crate::comm::{Comm, Deadlines};
use crate::compare::{compare, Comparison};
use crate::config::{in_place, template, Auto, Config, DeviceChoice, Fault};
use crate::data::corpus::Choices;
use crate::data::documents::Documents;
use crate::data::prepare::{self, prepare};
use crate::data::wikitext::Source;
use crate::doctor;
use crate::error::{exit_code, from_panic, tell_as_json, tell_end, Error, Result};
use crate::files;
use crate::launcher::Launch;
use crate::model::generate::Sampling;
use crate::run::RunDir;
use crate::stop::{exit_now, StopRequest};
use crate::torch;
use crate::train::prove::prove;
use crate::train::{self, Resume};
use crate::view;
use crate::watch::{Place, Watchdog};

/// Does what the command line asks for.
///
/// # Errors
/// As the verb; [`crate::error::exit_code`] says what they mean for the process.
pub fn run(cli: &Cli) -> Result<()> {
    if cli.log_format == LogFormat::Json {
        tell_as_json();
    }
    refuse_ranks(&cli.verb)?;
    files::make_limits_errors()?;
    if let Some(threads) = computing_threads(&cli.verb) {
        torch::bound_waiting(threads);
    }
    // Those wait until they know their rank.
    if !matches!(cli.verb, Verb::Train { .. } | Verb::Checkpoint { action: CheckpointAction::Prove { .. } }) {
        StopRequest::end_at_once()?;
        log::start(cli, None, true);
    }
    match &cli.verb {
        Verb::Prepare { source, tokenizer, out, valid, test, documents, document_ends, text_field, url } => {
            let choices = Choices {
                valid: valid.clone(),
                test: test.clone(),
                documents: documents.map(|name| match name {
                    DocumentName::Line => Documents::Line,
                    DocumentName::File => Documents::File,
                    DocumentName::BlankLine => Documents::BlankLine,
                    DocumentName::Record => Documents::Record,
                }),
                document_ends: *document_ends,
                text_field: text_field.clone(),
                ..Choices::default()
            };
            torch::set_threads(None)?;
            StopRequest::end_cleanly(prepare::abandon)?;
            let source = Source::parse(source, url.as_deref(), &choices)?;
            let meta = prepare(&source, &choices, tokenizer, out)?;
            print::line(&format!(
                "{}: {} train, {} valid, {} test tokens, vocabulary {}",
                out.display(),
                meta.train.tokens,
                meta.valid.tokens,
                meta.test.tokens,
                meta.vocab_size
            ))
        }
        Verb::Tokenize { tokenizer, decode, file } => tokenize::tokenize(tokenizer, *decode, file.as_deref()),
        Verb::Config { presets: true, .. } => config::show_presets(),
        Verb::Config { defaults: true, .. } => print::text(&template()),
        Verb::Config { config, training, print: key, .. } => config::show(config.as_deref(), training, key.as_deref()),
        Verb::Train { config, training, dry_run: true } => {
            StopRequest::end_at_once()?;
            let config = config::file(config.as_deref(), training)?;
            let parsed = training_config(&config, &training.overrides)?;
            on_every_rank(deadlines(&parsed.fault), |comm| {
                log::start(cli, None, comm.is_root());
                let plan = parsed.validate(comm.world_size);
                let plan = plan.map_err(|e| in_place(e, &config, &training.overrides))?;
                train::dry_run(comm, plan, print::line)
            })
        }
        Verb::Train { config, training, dry_run: false } => {
            // From the start: a launcher may ask for a stop while MPI is still gathering the ranks.
            let stop = StopRequest::install()?;
            Config::check_names(&training.allow_config_change)?;
            let resume = match training.resume.as_str() {
                "auto" => Resume::Auto,
                "never" => Resume::Never,
                path => Resume::From(path.into()),
            };
            let config = config::file(config.as_deref(), training)?;
            let parsed = training_config(&config, &training.overrides)?;
            on_every_rank(deadlines(&parsed.fault), |comm| {
                let plan = parsed.validate(comm.world_size);
                let plan = plan.map_err(|e| in_place(e, &config, &training.overrides))?;
                let run_dir = config::run_dir(training, &plan.config);
                log::start(cli, Some(&RunDir(run_dir.clone()).log(comm.rank)), comm.is_root());
                if comm.is_root() {
                    stop.acknowledge()?;
                }
                let watchdog = Watchdog::start(place(comm), &plan.config.fault)?;
                let allowed = &training.allow_config_change;
                watchdog.end(train::train(comm, &watchdog, &stop, plan, &run_dir, &resume, allowed))
            })
        }
        Verb::Eval { run, text } => on_every_rank(Deadlines::default(), |comm| inference::eval(comm, run, text)),
        Verb::Generate { run, prompt, tokens, temperature, top_k, top_p, seed, samples, dtype } => {
            let sampling = Sampling { temperature: *temperature, top_k: *top_k, top_p: *top_p, seed: *seed };
            inference::check_sampling(&sampling)?;
            inference::continue_prompts(run, prompt, *tokens, *samples, &sampling, *dtype)
        }
        Verb::Export { run, out, dtype } => interop::export(run, out, *dtype),
        Verb::Import { from, out } => interop::import(from, out),
        Verb::Compare { config, overrides, steps, devices, out } => {
            let device = |name: &DeviceName| match name {
                DeviceName::Cpu => DeviceChoice::Cpu,
                DeviceName::Cuda => DeviceChoice::Cuda,
            };
            let devices: Vec<DeviceChoice> = devices.iter().map(device).collect();
            let (steps, log_options) = (*steps as usize, log::options(cli));
            compare(
                &Comparison { config, overrides, steps, devices: &devices, out, log_options: &log_options },
                print::line,
            )
        }
        Verb::Checkpoint { action: CheckpointAction::List { run_dir } } => checkpoint::list(run_dir),
        Verb::Checkpoint { action: CheckpointAction::Verify { run_dir } } => checkpoint::verify(run_dir),
        Verb::Checkpoint { action: CheckpointAction::Prove { config, overrides, steps } } => {
            let stop = StopRequest::install()?;
            let parsed = training_config(config, overrides)?;
            on_every_rank(deadlines(&parsed.fault), |comm| {
                log::start(cli, None, comm.is_root());
                if comm.is_root() {
                    stop.acknowledge()?;
                }
                let folder = Path::new("runs").join(format!("{}-proof", parsed.name));
                let watchdog = Watchdog::start(place(comm), &parsed.fault)?;
                watchdog.end(prove(comm, &watchdog, &stop, &parsed, *steps as usize, &folder, print::line))
            })
        }
        Verb::Runs { folder, csv } => runs(folder, *csv),
        Verb::Watch { run_dir } => view::live::watch(run_dir, print::text),
        Verb::Doctor { libraries: true, .. } => doctor::run_libraries(print::line),
        Verb::Doctor { run_dir, device, deadline_s, .. } => {
            doctor::run(run_dir, device, Duration::from_secs(*deadline_s), print::line)
        }
        Verb::Completions { shell } => manual::completions(*shell),
        Verb::Man { verb } => manual::man(verb),
    }
}

/// Prints a table of the runs in a folder.
fn runs(folder: &Path, csv: bool) -> Result<()> {
    let listed = view::runs::list(folder, |unknown| {
        tracing::info!("waiting up to 12 s to see whether {unknown} runs of other machines go on");
    })?;
    if csv {
        return print::text(&view::runs::csv(&listed)?);
    }
    if listed.is_empty() {
        tracing::warn!("{} holds no run; name the folder that `lockstep train` writes into", folder.display());
    }
    print::text(&view::runs::text(&listed, view::terminal_width()))
}

/// Refuses the verbs that are one process's work to several: each would do all of it, in the same files.
fn refuse_ranks(verb: &Verb) -> Result<()> {
    let name = match verb {
        Verb::Prepare { .. } => "prepare",
        Verb::Tokenize { .. } => "tokenize",
        Verb::Config { .. } => "config",
        Verb::Generate { .. } => "generate",
        Verb::Export { .. } => "export",
        Verb::Import { .. } => "import",
        Verb::Runs { .. } => "runs",
        Verb::Watch { .. } => "watch",
        Verb::Checkpoint { action: CheckpointAction::List { .. } } => "checkpoint list",
        Verb::Checkpoint { action: CheckpointAction::Verify { .. } } => "checkpoint verify",
        Verb::Completions { .. } => "completions",
        Verb::Man { .. } => "man",
        // The comparison refuses them itself, with what would happen.
        Verb::Train { .. }
        | Verb::Eval { .. }
        | Verb::Compare { .. }
        | Verb::Doctor { .. }
        | Verb::Checkpoint { .. } => return Ok(()),
    };
    match Launch::from_environment().world_size {
        Some(ranks @ 2..) => Err(Error::Usage(format!(
            "`{name}` is one process's work, and a launcher started {ranks}; run it without launch/local or mpirun, and \
             with one task under srun"
        ))
        .into()),
        _ => Ok(()),
    }
}

/// The threads that a verb computes with for long, as [`torch::set_threads`] takes them; `None` for other verbs.
fn computing_threads(verb: &Verb) -> Option<Option<usize>> {
    let (config, overrides) = match verb {
        Verb::Train { config, training, .. } => (config::file(config.as_deref(), training).ok()?, &training.overrides),
        Verb::Checkpoint { action: CheckpointAction::Prove { config, overrides, .. } } => (config.clone(), overrides),
        Verb::Eval { .. } | Verb::Generate { .. } => return Some(None),
        _ => return None,
    };
    match Config::load(&config, overrides).map(|config| config.threads) {
        Ok(Auto::Number(threads)) => Some(Some(threads)),
        Ok(Auto::Auto) => Some(None),
        // The verb itself says why.
        Err(_) => None,
    }
}

/// Reads the configuration of a training, and does for it what must be done before MPI's thread exists.
fn training_config(path: &Path, overrides: &[String]) -> Result<Config> {
    let config = Config::load(path, overrides)?;
    if config.deterministic {
        torch::ask_for_deterministic_libraries();
    }
    Ok(config)
}

fn deadlines(fault: &Fault) -> Deadlines {
    Deadlines {
        startup: Duration::from_secs(fault.startup_deadline_s),
        step: Duration::from_secs(fault.step_deadline_s),
        save: Duration::from_secs(fault.save_deadline_s),
    }
}

fn place(comm: &Comm) -> Place {
    let Comm { rank, world_size, local_rank, node, nodes, .. } = *comm;
    Place { rank, world_size, local_rank, node, nodes, host: comm.host() }
}

/// Runs the same on every rank of the job. An error of one rank ends them all: the others may be waiting for it in a
/// collective and would wait for ever.
fn on_every_rank(deadlines: Deadlines, work: impl FnOnce(&mut Comm) -> Result<()>) -> Result<()> {
    let mut comm = Comm::start(deadlines)?;
    // A panic is a defect, but it must not leave the other ranks waiting either.
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&mut comm)));
    let error = match done {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(panic) => from_panic(panic.as_ref()),
    };
    match error.downcast_ref() {
        // The run in whose log this stands is as it was.
        Some(Error::Usage(_)) => tracing::warn!(target: log::LOG_FILE_ONLY, "refused: {error:#}"),
        // All ranks stop together, and rank 0's log says so.
        Some(Error::Preempted(_)) if !comm.is_root() => tracing::info!(target: log::LOG_FILE_ONLY, "{error:#}"),
        _ => tracing::error!(target: log::LOG_FILE_ONLY, "{error:#}"),
    }
    if matches!(error.downcast_ref(), Some(Error::Preempted(_))) {
        if !comm.is_root() {
            drop(comm);
            exit_now(exit_code(&error));
        }
    } else if comm.world_size > 1 {
        tell_end(&error, Some(comm.rank));
        comm.abort(exit_code(&error));
    }
    Err(error)
}
