//! From what the user wrote to values that are legal: [`Plan`].

use super::place::{wrong, About};
use super::{Activation, Auto, Config, Model, Norm, Schedule, PRESETS};
use crate::error::Result;

/// A configuration that has been checked against the number of ranks.
#[derive(Debug, Clone)]
pub struct Plan {
    /// As resolved: the preset's numbers filled in.
    pub config: Config,
    #[allow(missing_docs)]
    pub world_size: usize,
    /// (n_layer, n_head, n_embd).
    sizes: (usize, usize, usize),
    /// Sequences that one rank computes at a time.
    pub micro_batch: usize,
    /// Micro-batches of one rank in one optimizer step.
    pub accumulation: usize,
}

/// What fixes a model's arithmetic.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Shape {
    pub n_layer: i64,
    pub n_head: i64,
    /// C: the width of the hidden state, a multiple of `n_head`.
    pub n_embd: i64,
    pub block_size: i64,
    pub vocab_size: i64,
    pub dropout: f64,
    pub norm: Norm,
    pub activation: Activation,
    pub tied_head: bool,
    pub bias: bool,
    pub recompute: bool,
}

impl Plan {
    /// Settings that are legal, and that hardly anybody means.
    pub fn oddities(&self) -> Vec<String> {
        let (optim, steps) = (&self.config.optim, self.config.train.steps);
        let (warmup, decay) = (optim.warmup_steps, optim.decay_steps);
        let mut found = Vec::new();
        if warmup > steps {
            found.push(format!(
                "optim.warmup_steps is {warmup}, train.steps is {steps}: the learning rate never reaches optim.lr"
            ));
        } else if optim.schedule == Schedule::Wsd && warmup + decay > steps {
            found.push(format!(
                "optim.warmup_steps and optim.decay_steps are {warmup} and {decay}, train.steps is {steps}: the decay is cut short"
            ));
        }
        if optim.schedule == Schedule::Constant && (optim.min_lr > 0.0 || decay > 0) {
            found.push("optim.schedule is constant: optim.min_lr and optim.decay_steps change nothing".into());
        }
        found
    }

    /// The model over a vocabulary of this size.
    pub fn shape(&self, vocab_size: usize) -> Shape {
        let (n_layer, n_head, n_embd) = self.sizes;
        let Model { dropout, norm, activation, tied_head, bias, recompute, .. } = self.config.model;
        Shape {
            n_layer: n_layer as i64,
            n_head: n_head as i64,
            n_embd: n_embd as i64,
            block_size: self.config.data.block_size as i64,
            vocab_size: vocab_size as i64,
            dropout,
            norm,
            activation,
            tied_head,
            bias,
            recompute,
        }
    }
}

impl Config {
    /// Checks every value and fixes what `auto` and a preset's name mean for `world_size` ranks.
    ///
    /// # Errors
    /// Usage, with the key, what was expected, what was found, and numbers that would do.
    pub fn validate(mut self, world_size: usize) -> Result<Plan> {
        let (n_layer, n_head, n_embd) = self.model.sizes()?;
        self.check_ranges(n_layer, n_head, n_embd)?;
        let (batch, tokens) = (self.data.batch_size, self.data.block_size);
        if !batch.is_multiple_of(world_size) {
            let near = [batch / world_size * world_size, (batch / world_size + 1) * world_size];
            let near: Vec<String> = near.iter().filter(|&&n| n > 0).map(ToString::to_string).collect();
            let fits: Vec<String> = (1..=batch).filter(|&n| batch.is_multiple_of(n)).map(|n| n.to_string()).collect();
            return wrong_at(
                "data.batch_size",
                format!(
                    "{batch} sequences cannot be shared evenly by {world_size} ranks; use a batch_size of {}, or one of these \
                     numbers of ranks: {}",
                    near.join(" or "),
                    fits.join(", ")
                ),
            );
        }
        let share = batch / world_size;
        let micro_batch = match self.data.micro_batch {
            Auto::Number(n) if share.is_multiple_of(n) => n,
            Auto::Number(n) => {
                let fits: Vec<String> =
                    (1..=share).filter(|&n| share.is_multiple_of(n)).map(|n| n.to_string()).collect();
                return wrong_at(
                    "data.micro_batch",
                    format!(
                        "{n} does not divide the {share} sequences that each of {world_size} ranks takes of a batch_size of \
                         {batch}; these do: {}",
                        fits.join(", ")
                    ),
                );
            }
            Auto::Auto => largest_micro_batch(share, tokens),
        };
        self.model.preset = None;
        (self.model.n_layer, self.model.n_head, self.model.n_embd) = (Some(n_layer), Some(n_head), Some(n_embd));
        let accumulation = share / micro_batch;
        Ok(Plan { config: self, world_size, sizes: (n_layer, n_head, n_embd), micro_batch, accumulation })
    }

    fn check_ranges(&self, n_layer: usize, n_head: usize, n_embd: usize) -> Result<()> {
        let (data, optim, model) = (&self.data, &self.optim, &self.model);
        let rules = [
            (
                !["", ".", ".."].contains(&self.name.as_str()) && !self.name.contains('/'),
                "name",
                "the name of a folder",
                format!("`{}`", self.name),
            ),
            (
                !matches!(self.threads, Auto::Number(n) if n > 1024),
                "threads",
                "auto or 1 to 1024",
                match self.threads {
                    Auto::Auto => "auto".into(),
                    Auto::Number(n) => n.to_string(),
                },
            ),
            ((1..=1024).contains(&n_layer), "model.n_layer", "1 to 1024", n_layer.to_string()),
            ((1..=1024).contains(&n_head), "model.n_head", "1 to 1024", n_head.to_string()),
            ((1..=1 << 16).contains(&n_embd), "model.n_embd", "1 to 65536", n_embd.to_string()),
            (
                n_embd.is_multiple_of(n_head),
                "model.n_embd",
                "a multiple of model.n_head",
                format!("{n_embd} with {n_head} heads"),
            ),
            ((2..=1 << 20).contains(&data.block_size), "data.block_size", "2 to 1048576", data.block_size.to_string()),
            ((1..=1 << 20).contains(&data.batch_size), "data.batch_size", "1 to 1048576", data.batch_size.to_string()),
            ((0.0..1.0).contains(&model.dropout), "model.dropout", "0 to below 1", model.dropout.to_string()),
            (optim.lr > 0.0 && optim.lr.is_finite(), "optim.lr", "a number above 0", optim.lr.to_string()),
            (
                optim.betas.iter().all(|b| (0.0..1.0).contains(b)),
                "optim.betas",
                "two numbers from 0 to below 1",
                format!("{:?}", optim.betas),
            ),
            (optim.eps > 0.0 && optim.eps.is_finite(), "optim.eps", "a number above 0", optim.eps.to_string()),
            (
                optim.weight_decay >= 0.0 && optim.weight_decay.is_finite(),
                "optim.weight_decay",
                "0 or more",
                optim.weight_decay.to_string(),
            ),
            (
                optim.grad_clip >= 0.0 && optim.grad_clip.is_finite(),
                "optim.grad_clip",
                "0 (no clipping) or more",
                optim.grad_clip.to_string(),
            ),
            (
                (0.0..=optim.lr).contains(&optim.min_lr),
                "optim.min_lr",
                "0 to optim.lr",
                format!("{} with optim.lr {}", optim.min_lr, optim.lr),
            ),
            (
                optim.schedule != Schedule::Wsd || optim.decay_steps > 0,
                "optim.decay_steps",
                "1 or more for the schedule wsd",
                optim.decay_steps.to_string(),
            ),
            (
                !matches!(optim.schedule, Schedule::Cosine | Schedule::Linear)
                    || optim.decay_steps == 0
                    || optim.decay_steps > optim.warmup_steps,
                "optim.decay_steps",
                "0, or more than optim.warmup_steps",
                format!("{} with optim.warmup_steps {}", optim.decay_steps, optim.warmup_steps),
            ),
            (
                (1..=4096).contains(&self.comm.bucket_mib),
                "comm.bucket_mib",
                "1 to 4096",
                self.comm.bucket_mib.to_string(),
            ),
            (
                (1..=604_800).contains(&self.fault.startup_deadline_s),
                "fault.startup_deadline_s",
                "1 to 604800 (a week)",
                self.fault.startup_deadline_s.to_string(),
            ),
            (
                (1..=604_800).contains(&self.fault.step_deadline_s),
                "fault.step_deadline_s",
                "1 to 604800 (a week)",
                self.fault.step_deadline_s.to_string(),
            ),
            (
                (1..=604_800).contains(&self.fault.save_deadline_s),
                "fault.save_deadline_s",
                "1 to 604800 (a week)",
                self.fault.save_deadline_s.to_string(),
            ),
            (self.train.steps > 0, "train.steps", "1 or more", self.train.steps.to_string()),
            (self.train.epochs != Some(0), "train.epochs", "1 or more", "0".into()),
            (self.train.log_every > 0, "train.log_every", "1 or more", self.train.log_every.to_string()),
            (self.train.keep_last > 0, "train.keep_last", "1 or more", self.train.keep_last.to_string()),
        ];
        match rules.into_iter().find(|(legal, ..)| !legal) {
            Some((_, key, expected, found)) => wrong_at(key, format!("expected {expected}, found {found}")),
            None => Ok(()),
        }
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
                        wrong_at("model.preset", format!("there is no `{name}`; there are {}", names.join(", ")))
                    },
                    Ok,
                )
            }
            (Some(_), _) => wrong_at("model", "give either preset or n_layer, n_head and n_embd, not both".into()),
            (None, _) => wrong_at("model", "give a preset, or all of n_layer, n_head and n_embd".into()),
        }
    }
}

fn wrong_at<T>(key: &str, reason: String) -> Result<T> {
    wrong(About::Key(key.into()), reason)
}

/// The largest divisor of a rank's share whose tokens fit a fixed budget, so that the same configuration means the
/// same arithmetic on every machine.
fn largest_micro_batch(share: usize, block_size: usize) -> usize {
    const TOKENS: usize = 8192;
    (1..=share).rev().find(|&n| share.is_multiple_of(n) && n * block_size <= TOKENS).unwrap_or(1)
}
