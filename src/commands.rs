//! A verb each: from what the command line says to the call that does it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory;
use tch::{Device, Kind};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{filter_fn, FilterExt};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::prelude::*;

use crate::checkpoint;
use crate::cli::{CheckpointAction, Cli, DeviceName, LogFormat, Run, SplitName, Verb};
use crate::comm::{Comm, Deadlines};
use crate::compare::{compare, Comparison};
use crate::config::{Config, DeviceChoice, Fault, Plan};
use crate::data::loader::Samples;
use crate::data::prepare::{prepare, DataDir};
use crate::data::wikitext::Source;
use crate::device;
use crate::doctor;
use crate::error::{Error, Result};
use crate::fault::watchdog::Watchdog;
use crate::fault::StopRequest;
use crate::model::generate::{generate, Sampling};
use crate::model::{Gpt, GptConfig};
use crate::tokenizer::Tokenizer;
use crate::train::evaluate::Evaluation;
use crate::train::prove::prove;
use crate::train::record::{find_checkpoint, RunDir};
use crate::train::{self, Resume};

/// Does what the command line asks for.
///
/// # Errors
/// As the verb; [`crate::error::exit_code`] says what they mean for the process.
pub fn run(cli: &Cli) -> Result<()> {
    // Those wait until they know their rank.
    if !matches!(cli.verb, Verb::Train { .. } | Verb::Checkpoint { action: CheckpointAction::Prove { .. } }) {
        StopRequest::end_at_once()?;
        start_log(cli, None, true);
    }
    match &cli.verb {
        Verb::Prepare { source, tokenizer, out, url } => {
            device::set_threads(None);
            let meta = prepare(&Source::parse(source, url.as_deref())?, tokenizer, out)?;
            print(&format!(
                "{}: {} train, {} valid, {} test tokens, vocabulary {}",
                out.display(),
                meta.train.tokens,
                meta.valid.tokens,
                meta.test.tokens,
                meta.vocab_size
            ))
        }
        Verb::Tokenize { tokenizer, decode, file } => tokenize(tokenizer, *decode, file.as_deref()),
        Verb::Train { config, overrides, run_dir, resume, allow_config_change } => {
            // From the start: a launcher may ask for a stop while MPI is still gathering the ranks.
            let stop = StopRequest::install()?;
            Config::check_names(allow_config_change)?;
            let resume = match resume.as_str() {
                "auto" => Resume::Auto,
                "never" => Resume::Never,
                path => Resume::From(path.into()),
            };
            let parsed = training_config(config, overrides)?;
            on_every_rank(deadlines(&parsed.fault), |comm| {
                let plan = parsed.validate(comm.world_size);
                let plan = plan.map_err(|e| e.context(format!("in {}", config.display())))?;
                let run_dir = run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&plan.config.name));
                start_log(cli, Some(&RunDir(run_dir.clone()).log(comm.rank)), comm.is_root());
                let watchdog = Watchdog::start(comm, &plan.config.fault)?;
                watchdog.end(train::train(comm, &watchdog, &stop, plan, &run_dir, &resume, allow_config_change))
            })
        }
        Verb::Eval { run, split } => on_every_rank(Deadlines::default(), |comm| eval(comm, run, *split)),
        Verb::Generate { run, prompt, tokens, temperature, top_k, top_p, seed, samples } => {
            let sampling = Sampling { temperature: *temperature, top_k: *top_k, top_p: *top_p, seed: *seed };
            check_sampling(&sampling)?;
            continue_prompts(run, prompt, *tokens, *samples, &sampling)
        }
        Verb::Compare { config, overrides, steps, devices, out } => {
            let device = |name: &DeviceName| match name {
                DeviceName::Cpu => DeviceChoice::Cpu,
                DeviceName::Cuda => DeviceChoice::Cuda,
            };
            let devices: Vec<DeviceChoice> = devices.iter().map(device).collect();
            let (steps, log_options) = (*steps as usize, log_options(cli));
            compare(&Comparison { config, overrides, steps, devices: &devices, out, log_options: &log_options }, print)
        }
        Verb::Checkpoint { action: CheckpointAction::List { run_dir } } => {
            for (step, path) in checkpoints(run_dir)? {
                let files = fs::read_dir(&path).into_iter().flatten().flatten();
                let bytes: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
                print(&format!("{step}\t{:.1} MiB\t{}", bytes as f64 / 1048576.0, path.display()))?;
            }
            Ok(())
        }
        Verb::Checkpoint { action: CheckpointAction::Verify { run_dir } } => {
            let found = checkpoints(run_dir)?;
            let mut bad = Vec::new();
            for (step, path) in &found {
                match checkpoint::verify(path) {
                    Ok(()) => print(&format!("{step}\tgood\t{}", path.display()))?,
                    Err(error) => bad.push(format!("{error:#}")),
                }
            }
            match bad.is_empty() {
                true => Ok(()),
                false => Err(Error::Storage(format!(
                    "{} of {} checkpoints are damaged: {}; `--resume auto` passes over them",
                    bad.len(),
                    found.len(),
                    bad.join("; ")
                ))
                .into()),
            }
        }
        Verb::Checkpoint { action: CheckpointAction::Prove { config, overrides, steps } } => {
            let stop = StopRequest::install()?;
            let parsed = training_config(config, overrides)?;
            on_every_rank(deadlines(&parsed.fault), |comm| {
                start_log(cli, None, comm.is_root());
                let folder = Path::new("runs").join(format!("{}-proof", parsed.name));
                let watchdog = Watchdog::start(comm, &parsed.fault)?;
                watchdog.end(prove(comm, &watchdog, &stop, &parsed, *steps as usize, &folder, print))
            })
        }
        Verb::Doctor { libraries: true, .. } => doctor::run_libraries(print),
        Verb::Doctor { run_dir, device, .. } => doctor::run(run_dir, device, print),
        Verb::Completions { shell } => {
            // Into memory first: the generator panics where its output cannot be written.
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "lockstep", &mut script);
            io::stdout().write_all(&script).map_err(stdout_failed)
        }
    }
}

/// Reads the configuration of a training, and does for it what must be done before MPI's thread exists.
fn training_config(path: &Path, overrides: &[String]) -> Result<Config> {
    let config = Config::load(path, overrides)?;
    if config.deterministic {
        device::ask_for_deterministic_libraries();
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

/// Runs the same on every rank of the job. An error of one rank ends them all: the others may be waiting for it in a
/// collective and would wait for ever.
fn on_every_rank(deadlines: Deadlines, work: impl FnOnce(&mut Comm) -> Result<()>) -> Result<()> {
    let mut comm = Comm::start(deadlines)?;
    // A panic is a defect, but it must not leave the other ranks waiting either.
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&mut comm)));
    let error = match done {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(panic) => crate::error::from_panic(panic.as_ref()),
    };
    tracing::error!(target: LOG_FILE_ONLY, "{error:#}");
    if matches!(error.downcast_ref(), Some(Error::Preempted(_))) {
        // All ranks stopped together; one of them says so.
        if !comm.is_root() {
            drop(comm);
            std::process::exit(crate::error::exit_code(&error).into());
        }
    } else if comm.world_size > 1 {
        let _ = writeln!(io::stderr(), "lockstep: rank {}: {error:#}", comm.rank);
        comm.abort(crate::error::exit_code(&error));
    }
    Err(error)
}

/// Marks what `main` says on stderr anyway.
const LOG_FILE_ONLY: &str = "log-file-only";

/// Log lines on stderr, and in `file` where one is given. Ranks other than 0 put warnings only on stderr.
fn start_log(cli: &Cli, file: Option<&Path>, root: bool) {
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
fn log_options(cli: &Cli) -> Vec<&'static str> {
    let mut options = vec!["-v"; cli.verbose.into()];
    options.extend(cli.quiet.then_some("-q"));
    options.extend((cli.log_format == LogFormat::Json).then_some("--log-format=json"));
    options
}

/// A rank's log file. What is said before the run directory exists, or where it cannot be written, is dropped here: stderr
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
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let of_day = since_epoch.as_secs() % 86_400;
        write!(writer, "{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
    }
}

fn print(line: &str) -> Result<()> {
    writeln!(io::stdout().lock(), "{line}").map_err(stdout_failed)
}

fn stdout_failed(e: io::Error) -> anyhow::Error {
    if e.kind() == io::ErrorKind::BrokenPipe {
        // The reader has seen enough, as `head` does: no fault of anybody.
        std::process::exit(0);
    }
    Error::Storage(format!("cannot write to standard output: {e}")).into()
}

fn tokenize(tokenizer: &str, decode: bool, file: Option<&Path>) -> Result<()> {
    let tokenizer = match tokenizer {
        "gpt2" => Tokenizer::gpt2()?,
        path if Path::new(path).is_file() => Tokenizer::from_file(Path::new(path))?,
        name => {
            let message = format!("--tokenizer {name}: expected gpt2 or a tokenizer.json; there is no such file");
            return Err(Error::Usage(message).into());
        }
    };
    let (input, name): (Box<dyn BufRead>, String) = match file {
        Some(path) => {
            let file = File::open(path).map_err(|e| Error::read(path, e))?;
            (Box::new(BufReader::new(file)), path.display().to_string())
        }
        None => (Box::new(io::stdin().lock()), "standard input".into()),
    };
    let mut output = BufWriter::new(io::stdout().lock());
    let mut offset = 0;
    for (number, line) in input.split(b'\n').enumerate() {
        let bytes = line.map_err(|e| Error::read(Path::new(&name), e))?;
        let line = String::from_utf8(bytes).map_err(|e| {
            let at = offset + e.utf8_error().valid_up_to();
            Error::Data(format!("{name}: not UTF-8 at byte {at}; convert the text to UTF-8"))
        })?;
        offset += line.len() + 1;
        let written = if decode {
            let text = parse_ids(&line).and_then(|ids| tokenizer.decode(&ids));
            output.write_all(&text.map_err(|e| e.context(format!("{name}, line {}", number + 1)))?)
        } else {
            let ids: Vec<String> = tokenizer.encode(&line).iter().map(ToString::to_string).collect();
            output.write_all(ids.join(" ").as_bytes())
        };
        written.and_then(|()| output.write_all(b"\n")).map_err(stdout_failed)?;
    }
    output.flush().map_err(stdout_failed)
}

fn parse_ids(line: &str) -> Result<Vec<u32>> {
    line.split_whitespace()
        .map(|word| {
            word.parse().map_err(|_| Error::Data(format!("expected token ids between spaces, found `{word}`")).into())
        })
        .collect()
}

/// A run's model, loaded from one of its checkpoints.
struct Loaded {
    plan: Plan,
    tokenizer: Tokenizer,
    model: Gpt,
    device: Device,
    step: usize,
}

fn load(run: &Run, world_size: usize, local_rank: usize) -> Result<Loaded> {
    let dir = RunDir(run.run_dir.clone());
    if !dir.config().is_file() {
        return Err(Error::Usage(format!(
            "{} is not a run directory: it has no config.yaml; name the folder that `lockstep train` wrote",
            run.run_dir.display()
        ))
        .into());
    }
    let path = match run.checkpoint.as_str() {
        "latest" => find_checkpoint(&run.run_dir)?,
        "best" => match fs::read(dir.best()) {
            Ok(bytes) => {
                let best: train::record::Best = serde_json::from_slice(&bytes)
                    .map_err(|e| Error::Storage(format!("{}: {e}", dir.best().display())))?;
                dir.checkpoints().join(format!("step-{:08}", best.step))
            }
            // A run without evaluations has no best.
            Err(e) if e.kind() == io::ErrorKind::NotFound => find_checkpoint(&run.run_dir)?,
            Err(e) => return Err(Error::Storage(format!("cannot read {}: {e}", dir.best().display())).into()),
        },
        name => {
            let step = name.strip_prefix("step-").and_then(|step| step.parse::<usize>().ok()).ok_or_else(|| {
                Error::Usage(format!("--checkpoint {name}: expected best, latest or step-N, for example step-1000"))
            })?;
            dir.checkpoints().join(format!("step-{step:08}"))
        }
    };
    let there = checkpoints(&run.run_dir)?;
    if !there.iter().any(|(_, found)| *found == path) {
        let steps: Vec<String> = there.iter().map(|(step, _)| format!("step-{step}")).collect();
        return Err(Error::Storage(format!(
            "--checkpoint {}: there is no {}; there are {}",
            run.checkpoint,
            path.display(),
            steps.join(", ")
        ))
        .into());
    }
    let state = checkpoint::verify(&path)
        .and_then(|()| checkpoint::load_state(&path))
        .map_err(|e| e.context("the checkpoint cannot be used; --checkpoint latest takes the newest good one"))?;
    let mut config = dir.load_config()?;
    // How a finished model is used need not divide as its training did.
    config.data.batch_size = config.data.batch_size.div_ceil(world_size) * world_size;
    config.data.micro_batch = crate::config::Auto::Auto;
    let plan = config.validate(world_size)?;
    device::set_threads(None);
    let wanted = match plan.config.device {
        DeviceChoice::Cpu => "cpu",
        DeviceChoice::Cuda | DeviceChoice::Auto => "auto",
    };
    let device = device::select(wanted, local_rank)?;
    let tokenizer = Tokenizer::from_file(&dir.tokenizer())?;
    let config = GptConfig::new(&plan, tokenizer.vocab_size());
    // The weights are kept in fp32; bf16 pays on a GPU only.
    let kind = if device.is_cuda() { train::kind(plan.config.precision) } else { Kind::Float };
    let mut model = Gpt::new(config, device, kind);
    checkpoint::load_model(&path, &mut model.parameters).map_err(|e| {
        e.context(format!("a model of {} with a vocabulary of {}", dir.config().display(), tokenizer.vocab_size()))
    })?;
    Ok(Loaded { plan, tokenizer, model, device, step: state.step })
}

fn eval(comm: &Comm, run: &Run, split: SplitName) -> Result<()> {
    let Loaded { plan, tokenizer, model, device, step } = load(run, comm.world_size, comm.local_rank)?;
    let config = &plan.config.data;
    let data = DataDir::open(&config.dir)?;
    if data.train.tokenizer_digest() != tokenizer.digest() {
        return Err(Error::Data(format!(
            "{} was tokenized with another tokenizer (vocabulary {}) than {} was trained with (vocabulary {}); prepare the \
             text with --tokenizer {}",
            config.dir.display(),
            data.meta.vocab_size,
            run.run_dir.display(),
            tokenizer.vocab_size(),
            RunDir(run.run_dir.clone()).tokenizer().display()
        ))
        .into());
    }
    let (shard, split) = match split {
        SplitName::Valid => (data.valid, "valid"),
        SplitName::Test => (data.test, "test"),
    };
    let evaluation = Evaluation {
        split,
        samples: Samples::for_evaluation(shard, config.layout, config.block_size)?,
        layout: config.layout,
        micro_batch: plan.micro_batch,
        padding: i64::from(tokenizer.end_of_text()),
    };
    let row = evaluation.run(comm, &model, device, step, |_| ())?;
    if comm.is_root() {
        let mut writer = csv::Writer::from_writer(io::stdout());
        writer.serialize(row).and_then(|()| Ok(writer.flush()?)).map_err(|e| stdout_failed(e.into()))?;
    }
    Ok(())
}

fn check_sampling(sampling: &Sampling) -> Result<()> {
    let wrong = |option: &str, expected: &str, found: String| {
        Err(Error::Usage(format!("--{option}: expected {expected}, found {found}")).into())
    };
    match *sampling {
        Sampling { temperature, .. } if !(temperature >= 0.0 && temperature.is_finite()) => {
            wrong("temperature", "0 or more", temperature.to_string())
        }
        Sampling { top_k: Some(0), .. } => wrong("top-k", "1 or more", "0".into()),
        Sampling { top_p: Some(p), .. } if !(p > 0.0 && p <= 1.0) => wrong("top-p", "above 0 to 1", p.to_string()),
        _ => Ok(()),
    }
}

fn continue_prompts(run: &Run, prompts: &[String], tokens: usize, samples: u32, sampling: &Sampling) -> Result<()> {
    let Loaded { tokenizer, model, .. } = load(run, 1, 0)?;
    let rows: Vec<&String> = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, samples as usize)).collect();
    let ids: Vec<Vec<u32>> = rows.iter().map(|prompt| tokenizer.encode(prompt)).collect();
    let continuations = generate(&model, &ids, tokens, sampling, tokenizer.end_of_text());
    let many = rows.len() > 1;
    for (number, (prompt, ids)) in rows.iter().zip(continuations).enumerate() {
        if many && number > 0 {
            print("---")?;
        }
        print(&format!("{prompt}{}", String::from_utf8_lossy(&tokenizer.decode(&ids)?)))?;
    }
    Ok(())
}

fn checkpoints(run_dir: &Path) -> Result<Vec<(usize, std::path::PathBuf)>> {
    let found = checkpoint::list(&RunDir(run_dir.to_path_buf()).checkpoints());
    if found.is_empty() {
        let message = format!("{} holds no checkpoint; name the folder that `lockstep train` wrote", run_dir.display());
        return Err(Error::Storage(message).into());
    }
    Ok(found)
}
