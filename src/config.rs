//! A run's configuration: YAML as the user writes it ([`Config`]), and what it means once checked ([`Plan`]).
//!
//! Unknown keys are refused with the nearest known one. [`Config::validate`] is the only way to a [`Plan`],
//! so later code holds legal values only.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

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
    /// CPU threads of each rank.
    pub threads: Auto,
    /// What is read.
    pub data: Data,
    /// What is trained.
    pub model: Model,
    /// How it is trained.
    pub optim: Optim,
    /// How long, and what is written meanwhile.
    pub train: Train,
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
            threads: Auto::Auto,
            data: Data::default(),
            model: Model::default(),
            optim: Optim::default(),
            train: Train::default(),
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

/// Keys that do not change what is learnt, so that a resumed run may change them without asking.
const FREE_ON_RESUME: [&str; 8] = [
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.sample_every",
    "train.keep_last",
    "train.prompts",
    "threads",
];

/// A configuration that has been checked against the number of ranks.
#[derive(Debug, Clone)]
pub struct Plan {
    /// As resolved: the preset's numbers filled in.
    pub config: Config,
    #[allow(missing_docs)]
    pub world_size: usize,
    #[allow(missing_docs)]
    pub n_layer: usize,
    #[allow(missing_docs)]
    pub n_head: usize,
    /// C: the width of the hidden state, a multiple of `n_head`.
    pub n_embd: usize,
    /// Sequences that one rank computes at a time.
    pub micro_batch: usize,
    /// Micro-batches of one rank in one optimizer step.
    pub accumulation: usize,
}

impl Config {
    /// Reads a YAML file and applies `key=value` overrides to it.
    ///
    /// # Errors
    /// Usage: a file that cannot be read or is not YAML, a key that does not exist, a value of the wrong type.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::Usage(format!("cannot read the configuration {}: {e}", path.display())))?;
        Self::parse(&text, overrides).map_err(|e| e.context(format!("in {}", path.display())))
    }

    /// Parses YAML text and applies `key=value` overrides to it; errors as [`Config::load`].
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let mut root: Value =
            serde_yaml::from_str(text).map_err(|e| Error::Usage(format!("this is not a YAML configuration: {e}")))?;
        if root.is_null() {
            root = Value::Mapping(Mapping::new());
        }
        let known = serde_yaml::to_value(Self::with_every_key())?;
        for item in overrides {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| Error::Usage(format!("--set {item}: expected key=value, for example optim.lr=3e-4")))?;
            let value = serde_yaml::from_str(value)
                .map_err(|e| Error::Usage(format!("--set {item}: the value is not YAML: {e}")))?;
            set(&mut root, key, value)?;
        }
        check_keys(&root, &known, "")?;
        // A float that YAML writes like a whole number (lr: 1) or without a dot (3e-4, which YAML 1.1 reads as text).
        coerce_numbers(&mut root, &known);
        serde_path(&root)
    }

    fn with_every_key() -> Self {
        let model = Model {
            preset: Some("gpt-nano".into()),
            n_layer: Some(1),
            n_head: Some(1),
            n_embd: Some(1),
            ..Model::default()
        };
        let train = Train { init_from: Some("runs".into()), ..Train::default() };
        Self { model, train, ..Self::default() }
    }

    /// Checks every value and fixes what `auto` and a preset's name mean for `world_size` ranks.
    ///
    /// # Errors
    /// Usage, with the key, what was expected, what was found, and numbers that would do.
    pub fn validate(mut self, world_size: usize) -> Result<Plan> {
        let (n_layer, n_head, n_embd) = self.model.sizes()?;
        self.check_ranges(n_layer, n_head, n_embd)?;
        let (batch, tokens) = (self.data.batch_size, self.data.block_size);
        if batch % world_size != 0 {
            let near = [batch / world_size * world_size, (batch / world_size + 1) * world_size];
            let near: Vec<String> = near.iter().filter(|&&n| n > 0).map(ToString::to_string).collect();
            let fits: Vec<String> = (1..=batch).filter(|n| batch % n == 0).map(|n| n.to_string()).collect();
            return usage(format!(
                "data.batch_size: {batch} sequences cannot be shared evenly by {world_size} ranks; \
                 use a batch_size of {}, or one of these numbers of ranks: {}",
                near.join(" or "),
                fits.join(", ")
            ));
        }
        let share = batch / world_size;
        let micro_batch = match self.data.micro_batch {
            Auto::Number(n) if share % n == 0 => n,
            Auto::Number(n) => {
                let fits: Vec<String> = (1..=share).filter(|n| share % n == 0).map(|n| n.to_string()).collect();
                return usage(format!(
                    "data.micro_batch: {n} does not divide the {share} sequences that each of {world_size} ranks takes of \
                     a batch_size of {batch}; these do: {}",
                    fits.join(", ")
                ));
            }
            Auto::Auto => largest_micro_batch(share, tokens),
        };
        self.model.preset = None;
        (self.model.n_layer, self.model.n_head, self.model.n_embd) = (Some(n_layer), Some(n_head), Some(n_embd));
        let accumulation = share / micro_batch;
        Ok(Plan { config: self, world_size, n_layer, n_head, n_embd, micro_batch, accumulation })
    }

    fn check_ranges(&self, n_layer: usize, n_head: usize, n_embd: usize) -> Result<()> {
        let (data, optim, model) = (&self.data, &self.optim, &self.model);
        let rules = [
            (!self.name.is_empty() && !self.name.contains('/'), "name", "a word without `/`", self.name.clone()),
            (n_layer > 0, "model.n_layer", "1 or more", n_layer.to_string()),
            (n_head > 0, "model.n_head", "1 or more", n_head.to_string()),
            (
                n_head > 0 && n_embd > 0 && n_embd % n_head == 0,
                "model.n_embd",
                "a multiple of model.n_head",
                format!("{n_embd} with {n_head} heads"),
            ),
            (data.block_size >= 2, "data.block_size", "2 or more", data.block_size.to_string()),
            (data.batch_size >= 1, "data.batch_size", "1 or more", data.batch_size.to_string()),
            ((0.0..1.0).contains(&model.dropout), "model.dropout", "0 to below 1", model.dropout.to_string()),
            (optim.lr > 0.0 && optim.lr.is_finite(), "optim.lr", "a number above 0", optim.lr.to_string()),
            (
                optim.betas.iter().all(|b| (0.0..1.0).contains(b)),
                "optim.betas",
                "two numbers from 0 to below 1",
                format!("{:?}", optim.betas),
            ),
            (optim.eps > 0.0, "optim.eps", "a number above 0", optim.eps.to_string()),
            (optim.weight_decay >= 0.0, "optim.weight_decay", "0 or more", optim.weight_decay.to_string()),
            (optim.grad_clip >= 0.0, "optim.grad_clip", "0 (no clipping) or more", optim.grad_clip.to_string()),
            ((0.0..=optim.lr).contains(&optim.min_lr), "optim.min_lr", "0 to optim.lr", optim.min_lr.to_string()),
            (
                optim.schedule != Schedule::Wsd || optim.decay_steps > 0,
                "optim.decay_steps",
                "1 or more for the schedule wsd",
                optim.decay_steps.to_string(),
            ),
            (self.train.steps > 0, "train.steps", "1 or more", self.train.steps.to_string()),
            (self.train.log_every > 0, "train.log_every", "1 or more", self.train.log_every.to_string()),
            (self.train.keep_last > 0, "train.keep_last", "1 or more", self.train.keep_last.to_string()),
        ];
        match rules.into_iter().find(|(legal, ..)| !legal) {
            Some((_, key, expected, found)) => usage(format!("{key}: expected {expected}, found {found}")),
            None => Ok(()),
        }
    }

    /// The keys, with both values, in which `self` differs from `older` and which would change what is learnt.
    pub fn changes_since(&self, older: &Self) -> Result<Vec<(String, String, String)>> {
        let (new, old) = (flatten(self)?, flatten(older)?);
        let keys: std::collections::BTreeSet<&String> = new.keys().chain(old.keys()).collect();
        let text = |value: Option<&Value>| {
            let yaml = value.map(|value| serde_yaml::to_string(value).unwrap_or_default());
            yaml.map_or_else(|| "absent".into(), |yaml| yaml.trim().replace('\n', " "))
        };
        Ok(keys
            .into_iter()
            .filter(|key| new.get(*key) != old.get(*key))
            .filter(|key| *key != "name" && !FREE_ON_RESUME.contains(&key.as_str()))
            .map(|key| (key.clone(), text(old.get(key)), text(new.get(key))))
            .collect())
    }

    /// The resolved configuration as YAML, for `config.yaml`.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(serde_yaml::to_string(self)?)
    }
}

impl Model {
    /// (n_layer, n_head, n_embd), from the preset or the explicit numbers.
    fn sizes(&self) -> Result<(usize, usize, usize)> {
        let explicit = (self.n_layer, self.n_head, self.n_embd);
        match (&self.preset, explicit) {
            (None, (Some(n_layer), Some(n_head), Some(n_embd))) => Ok((n_layer, n_head, n_embd)),
            (Some(name), (None, None, None)) => {
                let found = PRESETS.iter().find(|preset| preset.0 == name);
                found.map(|&(_, layers, heads, width)| (layers, heads, width)).map_or_else(
                    || {
                        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.0).collect();
                        usage(format!("model.preset: there is no `{name}`; there are {}", names.join(", ")))
                    },
                    Ok,
                )
            }
            (Some(_), _) => usage("model: give either preset or n_layer, n_head and n_embd, not both".into()),
            (None, _) => usage("model: give a preset, or all of n_layer, n_head and n_embd".into()),
        }
    }
}

/// The largest divisor of a rank's share whose tokens fit a fixed budget, so that the same configuration means the
/// same arithmetic on every machine.
fn largest_micro_batch(share: usize, block_size: usize) -> usize {
    const TOKENS: usize = 8192;
    (1..=share).rev().find(|&n| share % n == 0 && n * block_size <= TOKENS).unwrap_or(1)
}

fn usage<T>(message: String) -> Result<T> {
    Err(Error::Usage(message).into())
}

fn set(root: &mut Value, path: &str, value: Value) -> Result<()> {
    let mut place = root;
    for key in path.split('.') {
        if place.is_null() {
            *place = Value::Mapping(Mapping::new());
        }
        let Value::Mapping(map) = place else {
            return usage(format!("--set {path}: `{key}` is inside something that has no keys"));
        };
        place = map.entry(key.into()).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

/// Refuses keys that `known` does not have, naming the nearest that it has.
fn check_keys(value: &Value, known: &Value, prefix: &str) -> Result<()> {
    let Value::Mapping(known) = known else { return Ok(()) };
    let Value::Mapping(map) = value else {
        return usage(format!("{}: expected keys and values, found {}", place(prefix), kind_of(value)));
    };
    let names: Vec<&str> = known.keys().filter_map(Value::as_str).collect();
    for (key, inner) in map {
        let name = key.as_str().unwrap_or_default();
        let Some(expected) = known.get(name) else {
            let nearest = names.iter().max_by(|a, b| {
                let similarity = |word: &str| strsim::jaro_winkler(word, name);
                similarity(a).total_cmp(&similarity(b))
            });
            let hint = nearest.map_or(String::new(), |word| format!("; did you mean `{prefix}{word}`?"));
            return usage(format!("unknown key `{prefix}{name}`{hint} (keys here: {})", names.join(", ")));
        };
        if expected.is_mapping() {
            check_keys(inner, expected, &format!("{prefix}{name}."))?;
        }
    }
    Ok(())
}

fn place(prefix: &str) -> &str {
    if prefix.is_empty() {
        "the file"
    } else {
        prefix.trim_end_matches('.')
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "keys and values",
        Value::Tagged(_) => "a tagged value",
    }
}

/// Turns text such as `3e-4` into the number that the key wants.
fn coerce_numbers(value: &mut Value, known: &Value) {
    match (value, known) {
        (Value::Mapping(map), Value::Mapping(known)) => {
            for (key, inner) in map.iter_mut() {
                if let Some(expected) = known.get(key) {
                    coerce_numbers(inner, expected);
                }
            }
        }
        (Value::Sequence(items), Value::Sequence(known)) => {
            for (item, expected) in items.iter_mut().zip(known) {
                coerce_numbers(item, expected);
            }
        }
        (value @ Value::String(_), Value::Number(_)) => {
            if let Some(number) = value.as_str().and_then(|text| text.parse::<f64>().ok()) {
                *value = number.into();
            }
        }
        _ => {}
    }
}

/// Deserializes section by section, so that an error can name the key that it is about.
fn serde_path(root: &Value) -> Result<Config> {
    let whole: std::result::Result<Config, _> = serde_yaml::from_value(root.clone());
    let Err(error) = whole else { return Ok(whole?) };
    // serde_yaml names no key in a value tree: find it by leaving out one leaf at a time.
    for key in leaves(root, "") {
        let mut without = root.clone();
        remove(&mut without, &key);
        if serde_yaml::from_value::<Config>(without).is_ok() {
            return usage(format!("{key}: {error}"));
        }
    }
    usage(error.to_string())
}

fn leaves(value: &Value, prefix: &str) -> Vec<String> {
    match value {
        Value::Mapping(map) => map
            .iter()
            .flat_map(|(key, inner)| {
                let name = key.as_str().unwrap_or_default();
                let path = if prefix.is_empty() { name.into() } else { format!("{prefix}.{name}") };
                leaves(inner, &path)
            })
            .collect(),
        _ => vec![prefix.to_string()],
    }
}

fn remove(root: &mut Value, path: &str) {
    let mut place = root;
    let (parents, last) = path.rsplit_once('.').unwrap_or(("", path));
    for key in parents.split('.').filter(|key| !key.is_empty()) {
        match place.get_mut(key) {
            Some(inner) => place = inner,
            None => return,
        }
    }
    if let Value::Mapping(map) = place {
        map.remove(last);
    }
}

fn flatten(config: &Config) -> Result<std::collections::BTreeMap<String, Value>> {
    let value = serde_yaml::to_value(config)?;
    let get = |path: &String| path.split('.').try_fold(&value, |inner, key| inner.get(key)).cloned();
    Ok(leaves(&value, "").into_iter().filter_map(|path| get(&path).map(|leaf| (path, leaf))).collect())
}
