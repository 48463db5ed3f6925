//! A run's configuration: YAML as the user writes it ([`Config`]), and what it means once checked ([`Plan`]).
//!
//! Unknown keys are refused with the nearest known one. [`Config::validate`] is the only way to a [`Plan`],
//! so later code holds legal values only.

mod check;
mod keys;
mod names;
mod place;
mod yaml;

use std::path::PathBuf;

use schemars::{json_schema, JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use check::{Plan, Shape};
pub use keys::{keys, Key};
pub use place::in_place;

use crate::error::{Error, Result};

/// The configuration file's keys, as the user writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The run's folder is `runs/NAME`, unless `--run-dir` names another.
    #[schemars(extend("x-free-on-resume" = true))]
    pub name: String,
    /// Determines everything random: first weights, order of samples, dropout, samples of text.
    pub seed: u64,
    /// What to compute on.
    pub device: DeviceChoice,
    /// The type of weights and activations in the forward and backward pass. Sums and optimizer state are fp32.
    pub precision: Precision,
    /// Whether a GPU, too, computes the same bits in every run, at some cost in speed (and NCCL without NVLS, unless
    /// `NCCL_ALGO` is set). CPUs always do.
    pub deterministic: bool,
    /// CPU threads of each rank. `auto`: `OMP_NUM_THREADS`, else the rank's share of the cores.
    #[schemars(extend("x-free-on-resume" = true))]
    pub threads: Auto,
    /// What is read.
    pub data: Data,
    /// What is trained.
    pub model: Model,
    /// How it is trained.
    pub optim: Optim,
    /// How the gradients travel.
    #[schemars(extend("x-free-on-resume" = true))]
    pub comm: CommOptions,
    /// How long, and what is written meanwhile.
    pub train: Train,
    /// How long to wait, and what to tolerate, before the run ends.
    #[schemars(extend("x-free-on-resume" = true))]
    pub fault: Fault,
}

/// `device:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// A GPU; an error if none can be used.
    Cuda,
    /// A GPU if one can be used, else the CPU.
    Auto,
}

impl DeviceChoice {
    /// The word in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Auto => "auto",
        }
    }
}

/// `precision:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    Fp32,
    /// 16 bits, with the range of fp32.
    Bf16,
}

/// A number, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
#[allow(missing_docs)]
pub enum Auto {
    Auto,
    Number(usize),
}

impl JsonSchema for Auto {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Auto".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]})
    }
}

impl TryFrom<Value> for Auto {
    type Error = String;
    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match &value {
            Value::String(word) if word == "auto" => Ok(Self::Auto),
            Value::Number(n) => n
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|&n| n > 0)
                .map(Self::Number)
                .ok_or_else(|| format!("expected `auto` or a whole number from 1, found {n}")),
            _ => Err("expected `auto` or a whole number from 1".into()),
        }
    }
}

impl From<Auto> for Value {
    fn from(auto: Auto) -> Self {
        match auto {
            Auto::Auto => "auto".into(),
            Auto::Number(n) => (n as u64).into(),
        }
    }
}

/// `data:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// The folder that `lockstep prepare` wrote.
    pub dir: PathBuf,
    /// How the text is cut into sequences.
    pub layout: Layout,
    /// The most tokens in a sequence: how far the model looks back.
    pub block_size: usize,
    /// Sequences in an optimizer step, over all ranks.
    pub batch_size: usize,
    /// Sequences that a rank computes at a time; fewer need less memory. `auto`: the most that divide its share evenly and
    /// have no more than 8,192 tokens.
    pub micro_batch: Auto,
}

/// `data.layout:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// The text as one stream, cut into blocks.
    Packed,
    /// Each line alone, cut if it is too long.
    Paragraphs,
}

/// `model:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// A size by name, from the table of presets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Blocks. This and the next two keys together replace a preset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_layer: Option<usize>,
    /// Attention heads in a block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_head: Option<usize>,
    /// Width of the hidden state, a multiple of `n_head`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_embd: Option<usize>,
    /// Share of activations dropped in training, from 0 to below 1.
    pub dropout: f64,
    /// Where the layer norms are.
    pub norm: Norm,
    /// The nonlinearity between the two linear layers of a block.
    pub activation: Activation,
    /// Whether the output head is the token embedding.
    pub tied_head: bool,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
    /// Whether to compute each block again in the backward pass instead of keeping its activations: less memory, more time.
    pub recompute: bool,
}

/// `model.norm:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// x + f(LN(x)) and a final norm, as GPT-2.
    Pre,
    /// LN(x + f(x)) and no final norm, as the original Transformer.
    Post,
}

/// `model.activation:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// The tanh form, as in GPT-2.
    Gelu,
    /// max(x, 0).
    Relu,
}

/// `optim:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optim {
    /// The highest learning rate.
    pub lr: f64,
    /// AdamW's two decay rates.
    pub betas: [f64; 2],
    /// Added to AdamW's denominator.
    pub eps: f64,
    /// Weight decay, on the matrices of linear layers only: not on biases, norms, embeddings or a tied head.
    pub weight_decay: f64,
    /// The largest norm of the gradient; 0 for no clipping.
    pub grad_clip: f64,
    /// What the learning rate does after the warm-up.
    pub schedule: Schedule,
    /// Steps in which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// The step at which the decay ends (`cosine`, `linear`; 0: the last step), or how many steps it takes (`wsd`).
    pub decay_steps: usize,
    /// The learning rate after the decay.
    pub min_lr: f64,
    /// Whether each rank keeps only its part of AdamW's state (ZeRO stage 1).
    pub zero1: bool,
}

/// `comm:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CommOptions {
    /// Whether gradients travel while the backward pass goes on.
    pub overlap: bool,
    /// MiB of fp32 gradients that travel at a time.
    pub bucket_mib: usize,
    /// The type in which gradients travel between GPUs. Between CPUs it is always fp32, since MPI has no bf16.
    pub grad_dtype: GradDtype,
}

/// `comm.grad_dtype:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GradDtype {
    /// As they are.
    Fp32,
    /// Half the traffic, less precise.
    Bf16,
}

/// `fault:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Fault {
    /// Seconds until all ranks have started and joined.
    pub startup_deadline_s: u64,
    /// Seconds that a rank waits for the others in a step, and that a micro-batch or a sample of text may take.
    pub step_deadline_s: u64,
    /// Seconds that a save may take, once it is waited for.
    pub save_deadline_s: u64,
    /// What to do if a loss or a gradient is not finite.
    pub nonfinite: NonFinite,
    /// How often Slurm may restart a job that gets no further than the last time; 0 for no limit.
    pub max_restarts_without_progress: u32,
}

/// `fault.nonfinite:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// End the run, its weights as they were.
    Stop,
    /// Leave the batch out, up to ten in a row.
    Skip,
}

/// `optim.schedule:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// It falls to `min_lr` along a cosine.
    Cosine,
    /// It falls to `min_lr` along a line.
    Linear,
    /// It stays, and falls along a line at the end (warm-up, stable, decay).
    Wsd,
}

/// `train:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Optimizer steps.
    #[schemars(extend("x-free-on-resume" = true))]
    pub steps: usize,
    /// The loss that a step minimises.
    pub loss: Loss,
    /// A run directory or a checkpoint whose weights a new run begins with. If its blocks are longer than
    /// `data.block_size`, its first positions are used.
    pub init_from: Option<PathBuf>,
    /// Steps between rows of train.csv.
    #[schemars(extend("x-free-on-resume" = true))]
    pub log_every: usize,
    /// Steps between evaluations on the validation split, besides the first and the last step; 0 for none.
    #[schemars(extend("x-free-on-resume" = true))]
    pub eval_every: usize,
    /// Steps between checkpoints, besides the last step; 0 for that one only.
    #[schemars(extend("x-free-on-resume" = true))]
    pub save_every: usize,
    /// Checkpoints to keep, beside the best one.
    #[schemars(extend("x-free-on-resume" = true))]
    pub keep_last: usize,
    /// Steps between samples of generated text, besides the first and the last step; 0 for none.
    #[schemars(extend("x-free-on-resume" = true))]
    pub sample_every: usize,
    /// What the samples begin with.
    #[schemars(extend("x-free-on-resume" = true))]
    pub prompts: Vec<String>,
}

/// `train.loss:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// The mean over the tokens of the batch: each token counts alike.
    TokenMean,
    /// The mean over sequences of each one's own mean: each sequence counts alike.
    SequenceMean,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "run".into(),
            seed: 3407,
            device: DeviceChoice::Auto,
            precision: Precision::Fp32,
            deterministic: false,
            threads: Auto::Auto,
            data: Data::default(),
            model: Model::default(),
            optim: Optim::default(),
            comm: CommOptions::default(),
            train: Train::default(),
            fault: Fault::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            dir: "data/sample".into(),
            layout: Layout::Packed,
            block_size: 128,
            batch_size: 32,
            micro_batch: Auto::Auto,
        }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            preset: None,
            n_layer: None,
            n_head: None,
            n_embd: None,
            dropout: 0.0,
            norm: Norm::Pre,
            activation: Activation::Gelu,
            tied_head: true,
            bias: true,
            recompute: false,
        }
    }
}

impl Default for Optim {
    fn default() -> Self {
        Self {
            lr: 5e-4,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
            schedule: Schedule::Constant,
            warmup_steps: 0,
            decay_steps: 0,
            min_lr: 0.0,
            zero1: false,
        }
    }
}

impl Default for CommOptions {
    fn default() -> Self {
        Self { overlap: true, bucket_mib: 25, grad_dtype: GradDtype::Fp32 }
    }
}

impl Default for Fault {
    fn default() -> Self {
        Self {
            startup_deadline_s: 600,
            step_deadline_s: 300,
            save_deadline_s: 600,
            nonfinite: NonFinite::Stop,
            max_restarts_without_progress: 3,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: 1000,
            loss: Loss::TokenMean,
            init_from: None,
            log_every: 1,
            eval_every: 250,
            save_every: 250,
            keep_last: 3,
            sample_every: 0,
            prompts: Vec::new(),
        }
    }
}

/// Sizes by name: (name, n_layer, n_head, n_embd).
pub const PRESETS: [(&str, usize, usize, usize); 8] = [
    ("gpt-nano", 3, 3, 48),
    ("gpt-micro", 4, 4, 128),
    ("gpt-mini", 6, 6, 192),
    ("gopher-44m", 8, 16, 512),
    ("gpt2", 12, 12, 768),
    ("gpt2-medium", 24, 16, 1024),
    ("gpt2-large", 36, 20, 1280),
    ("gpt2-xl", 48, 25, 1600),
];

/// A complaint about the configuration.
fn usage<T>(message: String) -> Result<T> {
    Err(Error::Usage(message).into())
}
