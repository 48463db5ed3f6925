//! `lockstep eval` and `lockstep generate`: what uses a trained model.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::{Device, Kind};

use super::args::{Dtype, Run, SplitName, Text};
use super::checkpoint::checkpoints;
use super::print;
use crate::comm::Comm;
use crate::config::{Config, Data, DeviceChoice, Layout, Plan};
use crate::data::loader::Samples;
use crate::data::prepare::encode_file;
use crate::data::shard::Shards;
use crate::error::{Error, Result};
use crate::files::write_durably;
use crate::model::generate::{generate, Sampling};
use crate::model::Gpt;
use crate::run::checkpoint::{self, State};
use crate::run::{self, find_checkpoint, tables, RunDir};
use crate::tokenizer::Tokenizer;
use crate::torch;
use crate::train::documents::{documents, DocumentRow};
use crate::train::evaluate::{Evaluation, Sums};
use crate::train::{self, open_data};

/// A run's model, loaded from one of its checkpoints.
pub struct Loaded {
    pub plan: Plan,
    pub tokenizer: Tokenizer,
    pub model: Gpt,
    pub device: Device,
    pub state: State,
}

/// Loads it onto the device that the run's configuration asks for.
fn load(run: &Run, dtype: Option<Dtype>, world_size: usize, local_rank: usize) -> Result<Loaded> {
    load_on(run, dtype, world_size, |config| {
        let wanted = match config.device {
            DeviceChoice::Cpu => "cpu",
            DeviceChoice::Cuda | DeviceChoice::Auto => "auto",
        };
        torch::select(wanted, local_rank)
    })
}

/// Loads it onto the device that is chosen; a GPU computes with weights of this type, or of the run's precision.
pub fn load_on(
    run: &Run,
    dtype: Option<Dtype>,
    world_size: usize,
    choose_device: impl Fn(&Config) -> Result<Device>,
) -> Result<Loaded> {
    let dir = RunDir(run.run_dir.clone());
    if !dir.config().is_file() {
        return Err(Error::Usage(format!(
            "{} is not a run directory: it has no config.yaml; name the folder that `lockstep train` wrote",
            run.run_dir.display()
        ))
        .into());
    }
    let mut config = dir.load_config()?;
    // How a finished model is used need not divide as its training did.
    config.data.batch_size = config.data.batch_size.div_ceil(world_size) * world_size;
    config.data.micro_batch = crate::config::Auto::Auto;
    let plan = config.validate(world_size)?;
    torch::set_threads(None)?;
    let device = choose_device(&plan.config)?;
    let tokenizer = Tokenizer::from_file(&dir.tokenizer())?;
    // The weights are kept in fp32; bf16 pays on a GPU only.
    let kind = match dtype {
        _ if !device.is_cuda() => Kind::Float,
        Some(Dtype::Fp32) => Kind::Float,
        Some(Dtype::Bf16) => Kind::BFloat16,
        None => train::kind(plan.config.precision),
    };
    let mut model = Gpt::new(plan.shape(tokenizer.vocab_size()), device, kind);
    let state = checkpoint::read_chosen(
        || choose(run, &dir),
        |path| {
            let state = check(run, path)?;
            checkpoint::load_model(path, &mut model.parameters).map_err(|e| {
                let vocab_size = tokenizer.vocab_size();
                e.context(format!("a model of {} with a vocabulary of {vocab_size}", dir.config().display()))
            })?;
            Ok(state)
        },
    )?;
    Ok(Loaded { plan, tokenizer, model, device, state })
}

/// The checkpoint that the command line means now.
fn choose(run: &Run, dir: &RunDir) -> Result<PathBuf> {
    match run.checkpoint.as_str() {
        "latest" => find_checkpoint(&run.run_dir),
        "best" => match fs::read(dir.best()) {
            Ok(bytes) => {
                let best: run::Best = serde_json::from_slice(&bytes)
                    .map_err(|e| Error::Storage(format!("{}: {e}", dir.best().display())))?;
                Ok(dir.checkpoint(best.step))
            }
            // A run without evaluations has no best.
            Err(e) if e.kind() == io::ErrorKind::NotFound => find_checkpoint(&run.run_dir),
            Err(e) => Err(Error::Storage(format!("cannot read {}: {e}", dir.best().display())).into()),
        },
        name => {
            let step = name.strip_prefix("step-").and_then(|step| step.parse::<usize>().ok()).ok_or_else(|| {
                Error::Usage(format!("--checkpoint {name}: expected best, latest or step-N, for example step-1000"))
            })?;
            Ok(dir.checkpoint(step))
        }
    }
}

/// Makes sure that a checkpoint is there and whole.
fn check(run: &Run, path: &Path) -> Result<State> {
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
    checkpoint::verify(path)
        .and_then(|()| checkpoint::load_state(path))
        .map_err(|e| e.context("the checkpoint cannot be used; --checkpoint latest takes the newest good one"))
}

/// Evaluates a checkpoint on a split or a file; rank 0 prints the row.
pub fn eval(comm: &Comm, run: &Run, text: &Text) -> Result<()> {
    let Loaded { plan, tokenizer, model, device, state } = load(run, None, comm.world_size, comm.local_rank)?;
    let Data { layout, block_size, .. } = plan.config.data;
    if let Some(stride) = text.stride {
        check_stride(stride, layout, block_size)?;
    }
    if let Some(path) = &text.by_document {
        check_place(path)?;
    }
    let (shards, split, bytes) = match &text.file {
        Some(file) => {
            let (shards, size) = encode_file(file, &tokenizer)?;
            (shards, file.display().to_string(), size.bytes)
        }
        None => split_of(comm, run, &plan.config.data, &tokenizer, text.split)?,
    };
    let evaluation = Evaluation {
        split,
        bytes,
        samples: match text.stride {
            Some(stride) => Samples::for_sliding(shards, block_size, stride)?,
            None => Samples::for_evaluation(shards, layout, block_size)?,
        },
        layout,
        micro_batch: plan.micro_batch,
        padding: i64::from(tokenizer.end_of_text()),
    };
    let documents = match text.by_document {
        Some(_) => documents(evaluation.samples.shards(), &tokenizer)?,
        None => Vec::new(),
    };
    let start = Instant::now();
    let starts: Vec<usize> = documents.iter().map(|document| document.start).collect();
    let starts = if starts.is_empty() { &[0] } else { &starts[..] };
    let parts = evaluation.measure(comm, &model, device, starts, |_| ())?;
    if !comm.is_root() {
        return Ok(());
    }
    let mut sums = Sums::default();
    parts.iter().for_each(|part| sums += *part);
    let row = tables::with_header(&[evaluation.row(state.step, sums, start)])?;
    let (header, row) = row.trim_end().split_once('\n').unwrap_or_default();
    let accuracy = sums.accuracy().map(|share| share.to_string()).unwrap_or_default();
    print::text(&format!("{header},accuracy\n{row},{accuracy}\n"))?;
    match &text.by_document {
        Some(path) => {
            let rows = documents.iter().zip(&parts).enumerate();
            let rows: Vec<DocumentRow> = rows.map(|(at, (document, sums))| document.row(at + 1, sums)).collect();
            write_durably(path, tables::with_header(&rows)?.as_bytes())
        }
        None => Ok(()),
    }
}

/// Refuses a table's place in no folder, before the evaluation takes its time.
fn check_place(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match folder.is_dir() {
        true => Ok(()),
        false => {
            let message = format!("--by-document {}: there is no folder {}", path.display(), folder.display());
            Err(Error::Usage(message).into())
        }
    }
}

/// Refuses a stride that a run cannot be evaluated with.
fn check_stride(stride: usize, layout: Layout, block_size: usize) -> Result<()> {
    let expected = match layout {
        Layout::Paragraphs => {
            "a run with data.layout: packed; this one reads each line alone, and no window slides over it".into()
        }
        Layout::Packed if !(1..=block_size).contains(&stride) => {
            format!("1 to the run's data.block_size, {block_size}")
        }
        Layout::Packed => return Ok(()),
    };
    Err(Error::Usage(format!("--stride {stride}: expected {expected}")).into())
}

/// A split of a run's data, its name, and the bytes of its text.
fn split_of(
    comm: &Comm,
    run: &Run,
    config: &Data,
    tokenizer: &Tokenizer,
    split: SplitName,
) -> Result<(Shards, String, u64)> {
    let (data, _) = open_data(comm, &config.dir, || ())?;
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
    Ok(match split {
        SplitName::Valid => (data.valid, "valid".into(), data.meta.valid.bytes),
        SplitName::Test => (data.test, "test".into(), data.meta.test.bytes),
    })
}

/// Refuses numbers that no distribution has.
pub fn check_sampling(sampling: &Sampling) -> Result<()> {
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

/// Prints continuations of prompts.
pub fn continue_prompts(
    run: &Run,
    prompts: &[String],
    tokens: usize,
    samples: u32,
    sampling: &Sampling,
    dtype: Option<Dtype>,
) -> Result<()> {
    let Loaded { tokenizer, model, .. } = load(run, dtype, 1, 0)?;
    let kind = if dtype == Some(Dtype::Bf16) { Kind::BFloat16 } else { model.kind() };
    let rows: Vec<&String> = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, samples as usize)).collect();
    let ids: Vec<Vec<u32>> = rows.iter().map(|prompt| tokenizer.encode(prompt)).collect();
    let continuations = generate(&model, &ids, tokens, sampling, tokenizer.end_of_text(), kind);
    let many = rows.len() > 1;
    for (number, (prompt, ids)) in rows.iter().zip(continuations).enumerate() {
        if many && number > 0 {
            print::line("---")?;
        }
        print::line(&format!("{prompt}{}", String::from_utf8_lossy(&tokenizer.decode(&ids)?)))?;
    }
    Ok(())
}
