//! The command line: types only.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::data::inputs::Aside;

/// Trains GPT language models, with one process or with several ranks.
#[derive(Debug, Parser)]
#[command(name = "lockstep", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// The format of log lines on standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Logs more, and which samples each rank computes, in a log for each rank; given twice, everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Shows warnings only. A run's `logs/` still get everything.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line, for programs.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Turns text into a data folder of token ids.
    #[command(
        after_help = "Example:\n  lockstep prepare --source wikitext-2-raw --tokenizer bpe:8192 --out data/wikitext-2"
    )]
    Prepare {
        /// `sample` (stories that a grammar makes), `wikitext-2`, `wikitext-2-raw`, `wikitext-103`, `wikitext-103-raw` (downloaded,
        /// checksum verified), a folder with train.txt, valid.txt and test.txt, or wiki.train.tokens and so on; or files of
        /// your own, folders of them, or patterns: .txt and .jsonl (both also as .gz or .zst), .parquet, and token ids in
        /// nanoGPT's or llm.c's .bin.
        #[arg(long, required = true, num_args = 1..)]
        source: Vec<String>,
        /// `gpt2` (50,257 tokens), `bpe:N` (N tokens, trained on the training split), or the path of a tokenizer.json.
        #[arg(long)]
        tokenizer: String,
        /// The data folder to write.
        #[arg(long)]
        out: PathBuf,
        /// What is set aside for validation: a share of the documents of your own files, or files. Of a single text file
        /// without --documents it is the end, or what is before the test split.
        #[arg(long, num_args = 1.., value_name = "N%|FILE")]
        valid: Vec<Aside>,
        /// What is set aside for a test; without it there is no test split.
        #[arg(long, num_args = 1.., value_name = "N%|FILE")]
        test: Vec<Aside>,
        /// What counts as a document in text files, the default being each file if there are several. Records are documents
        /// of their own. No document is in two splits.
        #[arg(long, value_enum)]
        documents: Option<DocumentName>,
        /// Puts an `<|endoftext|>` after each document.
        #[arg(long)]
        document_ends: bool,
        /// The field of .jsonl files, and the column of .parquet files, that holds the text; `text` if not given.
        #[arg(long, value_name = "NAME")]
        text_field: Option<String>,
        /// Another address to download the archive from.
        #[arg(long)]
        url: Option<String>,
    },
    /// Prints a line of token ids for each line of text, or the text of ids.
    #[command(after_help = "Example:\n  echo 'Hello world' | lockstep tokenize --tokenizer gpt2")]
    Tokenize {
        /// `gpt2` or the path of a tokenizer.json.
        #[arg(long)]
        tokenizer: String,
        /// Reads ids and prints text.
        #[arg(long)]
        decode: bool,
        /// The file to read; standard input if none is named.
        file: Option<PathBuf>,
    },
    /// Trains a model, or resumes a run.
    #[command(
        after_help = "Examples:\n  lockstep train --config configs/wikitext2.yaml --set optim.lr=1e-3\n  lockstep train --run-dir \
                      runs/wikitext2 --set train.steps=3000"
    )]
    Train {
        /// The run's YAML file; without one, the run at `--run-dir` goes on with its own configuration.
        #[arg(long, required_unless_present = "run_dir")]
        config: Option<PathBuf>,
        /// How to train.
        #[command(flatten)]
        training: Training,
        /// Only prints what the run would take: memory of each rank, steps and tokens, time, disk. Nothing is written.
        #[arg(long)]
        dry_run: bool,
    },
    /// Prints the configuration that `train` takes from the same arguments, or one value of it.
    #[command(
        after_help = "Example:\n  lockstep config --config configs/wikitext2.yaml --set optim.lr=1e-3 --print optim.lr"
    )]
    Config {
        /// The YAML file; without one, that of the run at `--run-dir`, or else every key has its default.
        #[arg(long)]
        config: Option<PathBuf>,
        /// As for `train`.
        #[command(flatten)]
        training: Training,
        /// Prints the value of this key only, or of `run_dir`.
        #[arg(long, value_name = "KEY")]
        print: Option<String>,
        /// Instead, prints a configuration file with every key, its meaning and its default.
        #[arg(long, conflicts_with_all = ["config", "overrides", "run_dir", "print"])]
        defaults: bool,
        /// Instead, prints the sizes of all presets as JSON.
        #[arg(long, conflicts_with_all = ["config", "print", "defaults"])]
        presets: bool,
    },
    /// Evaluates a checkpoint, and prints a row with the columns of eval.csv, and after them `accuracy`: the share of the
    /// tokens that the model finds likeliest.
    #[command(
        after_help = "Examples:\n  lockstep eval --run-dir runs/wikitext2 --split test --stride 32\n  lockstep eval --run-dir \
                      runs/wikitext2 --file story.txt --by-document documents.csv"
    )]
    Eval {
        /// The run and its checkpoint.
        #[command(flatten)]
        run: Run,
        /// What to evaluate on.
        #[command(flatten)]
        text: Text,
    },
    /// Continues prompts with a trained model.
    #[command(
        after_help = "Example:\n  lockstep generate --run-dir runs/wikitext2 --prompt ' The river' --tokens 100"
    )]
    Generate {
        /// The run and its checkpoint.
        #[command(flatten)]
        run: Run,
        /// The text to continue; may be given several times.
        #[arg(long, required = true, num_args = 1.., value_name = "TEXT")]
        prompt: Vec<String>,
        /// Tokens to generate.
        #[arg(long, default_value_t = 100)]
        tokens: usize,
        /// Divides the logits; 0 always takes the likeliest token.
        #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
        temperature: f64,
        /// Draws only from the K likeliest tokens.
        #[arg(long)]
        top_k: Option<usize>,
        /// Draws only from the likeliest tokens that together reach this probability.
        #[arg(long)]
        top_p: Option<f64>,
        /// Determines every draw.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// How many continuations to write for each prompt.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
        samples: u32,
        /// The type that the weights are read in [default: fp32 on a CPU, the run's precision on a GPU]. bf16 is
        /// faster, and rounds.
        #[arg(long, value_enum)]
        dtype: Option<Dtype>,
    },
    /// Writes a trained model as a Hugging Face folder, which `transformers` loads as a GPT-2.
    #[command(after_help = "Example:\n  lockstep export --run-dir runs/wikitext2 --out exports/wikitext2")]
    Export {
        /// The run and its checkpoint.
        #[command(flatten)]
        run: Run,
        /// The folder to write; it must not exist yet.
        #[arg(long)]
        out: PathBuf,
        /// The type that the weights are rounded to.
        #[arg(long, value_enum, default_value_t = Dtype::Fp32)]
        dtype: Dtype,
    },
    /// Makes a run directory of a Hugging Face folder with a GPT-2: to evaluate it, to generate with it, or to begin a
    /// training with its weights.
    #[command(after_help = "Example:\n  lockstep import --from downloads/gpt2 --out runs/gpt2")]
    Import {
        /// The folder, with config.json, model.safetensors (or several files and their index), and tokenizer.json (or
        /// vocab.json and merges.txt).
        #[arg(long)]
        from: PathBuf,
        /// The run directory to write; it must not exist yet.
        #[arg(long)]
        out: PathBuf,
    },
    /// Trains the same steps on each device, and prints how long they took, as CSV.
    ///
    /// Seed and batches are the same. The first five steps (of fewer than ten, the first half) warm up: they count neither
    /// for the median nor for the tokens a second. If a device does not exist, that is an error, after the rows of those
    /// before it.
    #[command(
        after_help = "Example:\n  lockstep compare --config configs/homework.yaml --steps 50 --devices cpu,cuda"
    )]
    Compare {
        /// The run's YAML file.
        #[arg(long)]
        config: PathBuf,
        /// Replaces one key of it, for example data.dir=data/wikitext-2.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
        /// Optimizer steps on each device.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
        steps: u32,
        /// The devices, in order. The speed-up is over the first one.
        #[arg(long, value_enum, value_delimiter = ',', default_value = "cpu,cuda")]
        devices: Vec<DeviceName>,
        /// A file for the same table. The runs are beside it while they last.
        #[arg(long, default_value = "compare.csv")]
        out: PathBuf,
    },
    /// Lists or verifies the checkpoints of a run, or proves that a run resumes bit for bit.
    #[command(after_help = "Example:\n  lockstep checkpoint verify --run-dir runs/wikitext2")]
    Checkpoint {
        /// What to do with them.
        #[command(subcommand)]
        action: CheckpointAction,
    },
    /// Lists the runs in a folder: what each is doing, and what it has come to.
    ///
    /// Runs that were written to last come first. Nothing is written, so a run that goes on is not disturbed.
    #[command(after_help = "Examples:\n  lockstep runs\n  lockstep runs runs/sweep --csv > sweep.csv")]
    Runs {
        /// The folder that the runs lie in, also in folders of it.
        #[arg(default_value = "runs", value_name = "DIR")]
        folder: PathBuf,
        /// Prints CSV.
        #[arg(long)]
        csv: bool,
    },
    /// Shows a run while it goes on: curves, speed, ranks and the time left. `q` leaves, and the run goes on.
    ///
    /// If standard output is no terminal, it prints what it would show, once.
    #[command(after_help = "Example:\n  lockstep watch runs/wikitext2")]
    Watch {
        /// The run directory.
        #[arg(value_name = "RUN")]
        run_dir: PathBuf,
    },
    /// Checks whether a job can train as it was started, and says what to do if it cannot.
    ///
    /// Checks launcher, libraries, GPUs, networks, clocks, the run directory and sums. Start it as you would start `train`.
    #[command(
        after_help = "Examples:\n  srun --mpi=pmix launch/rank doctor --run-dir runs\n  lockstep doctor --libraries"
    )]
    Doctor {
        /// Checks only this machine, with or without a GPU: loads every library that training on a GPU needs, and says where
        /// each one is.
        #[arg(long, conflicts_with_all = ["run_dir", "device"])]
        libraries: bool,
        /// The folder for runs, which every rank must see and write to.
        #[arg(long, default_value = "runs")]
        run_dir: PathBuf,
        /// What the ranks compute on.
        #[arg(long, default_value = "auto", value_parser = ["auto", "cpu", "cuda"])]
        device: String,
        /// For tests: how many seconds the ranks wait for each other.
        #[arg(long, hide = true, default_value_t = 60)]
        deadline_s: u64,
    },
    /// Prints shell completions.
    #[command(
        after_help = "Example:\n  lockstep completions bash > ~/.local/share/bash-completion/completions/lockstep"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Prints the man page of the program, or of a verb.
    #[command(
        after_help = "Examples:\n  lockstep man train | man -l -\n  lockstep man > ~/.local/share/man/man1/lockstep.1"
    )]
    Man {
        /// The verb, as `train` or `checkpoint prove`.
        verb: Vec<String>,
    },
}

/// What counts as a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum DocumentName {
    Line,
    File,
    BlankLine,
    Record,
}

/// The options of `train` besides its file.
#[derive(Debug, Args)]
pub struct Training {
    /// Replaces one key of the file, for example optim.lr=3e-4.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Where the run's files go; runs/NAME if not given.
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// Where to start: `auto`, the newest checkpoint of the run directory, if there is one; `never`, a new run; or the path
    /// of a checkpoint or of another run directory.
    #[arg(long, default_value = "auto", value_name = "auto|never|PATH")]
    pub resume: String,
    /// Allows a resumed run to change this key, although that changes what is learnt.
    #[arg(long, value_name = "KEY")]
    pub allow_config_change: Vec<String>,
}

/// Which checkpoint of which run.
#[derive(Debug, Args)]
pub struct Run {
    /// The run directory.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Which checkpoint: `best`, `latest` or `step-N`.
    #[arg(long, default_value = "best")]
    pub checkpoint: String,
}

/// What is evaluated on, and how.
#[derive(Debug, Args)]
pub struct Text {
    /// The split of the run's data to evaluate on.
    #[arg(long, value_enum, default_value_t = SplitName::Valid)]
    pub split: SplitName,
    /// Evaluates on this file instead, with the run's tokenizer: .txt or .jsonl (each also with .gz or .zst), or .parquet.
    #[arg(long, value_name = "TEXT", conflicts_with = "split")]
    pub file: Option<PathBuf>,
    /// Slides a window of `data.block_size` tokens over the text by N tokens at a time, so that each token is predicted once,
    /// and from at least `data.block_size` - N tokens before it. Without it, blocks stand side by side.
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// Also writes a table with a row for each document: an article that begins with a line ` = Title = `, or, in data
    /// prepared with `--document-ends`, what one `<|endoftext|>` ends.
    #[arg(long, value_name = "CSV")]
    pub by_document: Option<PathBuf>,
}

/// A split that can be evaluated on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum SplitName {
    Valid,
    Test,
}

/// A type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Dtype {
    Fp32,
    Bf16,
}

/// A device that training can be timed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum DeviceName {
    Cpu,
    Cuda,
}

/// The verbs of `lockstep checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointAction {
    /// Prints step, size and folder of each checkpoint.
    #[command(after_help = "Example:\n  lockstep checkpoint list --run-dir runs/wikitext2")]
    List {
        /// The run directory.
        #[arg(long)]
        run_dir: PathBuf,
    },
    /// Compares every byte of every checkpoint with what was written.
    #[command(after_help = "Example:\n  lockstep checkpoint verify --run-dir runs/wikitext2")]
    Verify {
        /// The run directory.
        #[arg(long)]
        run_dir: PathBuf,
    },
    /// Trains a few steps straight, and the second half of them again from a checkpoint, and compares every bit.
    #[command(after_help = "Example:\n  launch/local 2 checkpoint prove --config configs/sample.yaml")]
    Prove {
        /// The run's YAML file.
        #[arg(long)]
        config: PathBuf,
        /// Replaces one key of it, for example precision=bf16.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
        /// Optimizer steps of the straight run.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..))]
        steps: u32,
    },
}
