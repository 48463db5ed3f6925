//! A run's configuration: YAML as the user writes it ([`Config`]), and what it means once checked ([`Plan`]).
//!
//! Unknown keys are refused with the nearest known one. [`Config::validate`] is the only way to a [`Plan`],
//! so later code holds legal values only.

mod check;
mod names;
mod place;
mod yaml;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_yaml::Value;

pub use check::Plan;
pub use place::in_place;

use crate::error::{Error, Result};

/// The configuration file's keys, as the user writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Names the run; its folder is `runs/NAME` unless `--run-dir` says otherwise.
    pub name: String,
    /// Everything random follows from it: weights, sample order, dropout, sampling.
    pub seed: u64,
    /// `cpu`, `cuda`, or `auto`: a GPU where there is one.
    pub device: DeviceChoice,
    /// The type of weights and activations in the forward and backward pass.
    pub precision: Precision,
    /// Whether a GPU, too, computes the same bits in every run; CPUs always do.
    pub deterministic: bool,
    /// CPU threads of each rank.
    pub threads: Auto,
    /// What is read.
    pub data: Data,
    /// What is trained.
    pub model: Model,
    /// How it is trained.
    pub optim: Optim,
    /// How the gradients travel.
    pub comm: CommOptions,
    /// How long, and what is written meanwhile.
    pub train: Train,
    /// What is borne before the run ends.
    pub fault: Fault,
}

/// `device:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum DeviceChoice {
    Cpu,
    Cuda,
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

/// `precision:`. Master weights, gradients' sums and optimizer state are fp32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Precision {
    Fp32,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// The folder that `lockstep prepare` wrote.
    pub dir: PathBuf,
    /// How the text is cut into samples.
    pub layout: Layout,
    /// T: the longest context, in tokens.
    pub block_size: usize,
    /// Sequences an optimizer step, over all ranks.
    pub batch_size: usize,
    /// Sequences that one rank computes at a time.
    pub micro_batch: Auto,
}

/// `data.layout:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// The split as one stream, cut into blocks of T tokens.
    Packed,
    /// Each line alone, cut into pieces of at most T tokens, padded and masked.
    Paragraphs,
}

/// `model:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// A size by name; `n_layer`, `n_head` and `n_embd` take its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[allow(missing_docs)]
    pub n_layer: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[allow(missing_docs)]
    pub n_head: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[allow(missing_docs)]
    pub n_embd: Option<usize>,
    /// The share of activations dropped in training, 0 to below 1.
    pub dropout: f64,
    /// Where the layer norms stand.
    pub norm: Norm,
    /// The nonlinearity of the MLP.
    pub activation: Activation,
    /// Whether the output head is the token embedding.
    pub tied_head: bool,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
    /// Computes each block again in the backward pass instead of keeping its activations.
    pub recompute: bool,
}

/// `model.norm:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// x + f(LN(x)), and a final norm: GPT-2.
    Pre,
    /// LN(x + f(x)), no final norm: the original Transformer.
    Post,
}

/// `model.activation:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// The tanh form, as in GPT-2.
    Gelu,
    /// max(x, 0).
    Relu,
}

/// `optim:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optim {
    /// The highest learning rate.
    pub lr: f64,
    /// Adam's two decay rates.
    pub betas: [f64; 2],
    /// Added to Adam's denominator.
    pub eps: f64,
    /// Decoupled, on linear layers' matrices only.
    pub weight_decay: f64,
    /// The gradient's largest global norm; 0 for no clipping.
    pub grad_clip: f64,
    /// The learning rate's course.
    pub schedule: Schedule,
    /// Steps of linear rise from 0.
    pub warmup_steps: usize,
    /// Where the decay ends (cosine, linear), or how long it is (wsd); 0 means `train.steps` for the first two.
    pub decay_steps: usize,
    /// The learning rate after the decay.
    pub min_lr: f64,
    /// Whether each rank keeps its part of Adam's moments only.
    pub zero1: bool,
}

/// `comm:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommOptions {
    /// Whether gradients travel while the backward pass goes on.
    pub overlap: bool,
    /// MiB of fp32 gradients that travel at a time.
    pub bucket_mib: usize,
    /// The type in which gradients travel between GPUs; between CPUs it is fp32, since MPI has no bf16.
    pub grad_dtype: GradDtype,
}

/// `comm.grad_dtype:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum GradDtype {
    Fp32,
    Bf16,
}

/// `fault:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fault {
    /// Seconds until all ranks have started and joined.
    pub startup_deadline_s: u64,
    /// Seconds that a rank waits for the others within a step, and that a micro-batch may take.
    pub step_deadline_s: u64,
    /// Seconds that a checkpoint may take to be written, once it is waited for.
    pub save_deadline_s: u64,
    /// What happens to a batch whose loss or gradient is not finite.
    pub nonfinite: NonFinite,
    /// How often Slurm may start a job again that gets no further; 0 for no limit.
    pub max_restarts_without_progress: u32,
}

/// `fault.nonfinite:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends, with its weights as they were.
    Stop,
    /// The batch is left out, up to ten in a row.
    Skip,
}

/// `optim.schedule:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Schedule {
    Constant,
    Cosine,
    Linear,
    Wsd,
}

/// `train:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Optimizer steps.
    pub steps: usize,
    /// What a step makes smaller.
    pub loss: Loss,
    /// A run directory or a checkpoint whose weights the run begins with.
    pub init_from: Option<PathBuf>,
    /// Steps between rows of train.csv.
    pub log_every: usize,
    /// Steps between evaluations; 0 for none.
    pub eval_every: usize,
    /// Steps between checkpoints; 0 for the last step only.
    pub save_every: usize,
    /// Checkpoints kept beside the best.
    pub keep_last: usize,
    /// Steps between samples of generated text; 0 for none.
    pub sample_every: usize,
    /// What the samples begin with.
    pub prompts: Vec<String>,
}

/// `train.loss:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Sum of negative log-likelihood over counted tokens, of the global batch.
    TokenMean,
    /// Mean over sequences of each sequence's own token mean.
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
