//! Evaluation: every target of a split once, shared by all ranks.

use std::time::Instant;

use tch::Device;

use crate::comm::Comm;
use crate::config::Layout;
use crate::data::loader::Samples;
use crate::error::Result;
use crate::model::Gpt;
use crate::run::tables::{rounded, EvalRow};
use crate::watch::Phase;

/// A split to evaluate on, and how.
pub struct Evaluation {
    /// `valid` or `test`.
    pub split: &'static str,
    /// The split, cut for evaluation.
    pub samples: Samples,
    /// How it was cut; word-level perplexity is known for one stream only.
    pub layout: Layout,
    /// Sequences computed at a time.
    pub micro_batch: usize,
    /// The token that fills short rows.
    pub padding: i64,
}

impl Evaluation {
    /// Evaluates the model after `step` steps. Batch i is computed by rank i modulo the world size; the sums of negative
    /// log-likelihood and the counts are added, never averages. `enter` is told of each micro-batch that begins, and of the
    /// exchange.
    ///
    /// # Errors
    /// Communication, where a peer does not answer in time; data, where the split can no longer be read.
    pub fn run(&self, comm: &Comm, model: &Gpt, device: Device, step: usize, enter: impl Fn(Phase)) -> Result<EvalRow> {
        let start = Instant::now();
        let all: Vec<usize> = (0..self.samples.len()).collect();
        let (mut nll, mut tokens) = (0.0, 0);
        for samples in all.chunks(self.micro_batch).skip(comm.rank).step_by(comm.world_size) {
            enter(Phase::Evaluation);
            let batch = self.samples.batch(samples, self.padding, device, |_| 1.0)?;
            nll += model.loss(&batch.inputs, &batch.targets, &batch.weights, batch.counted.as_ref());
            tokens += samples.iter().map(|&sample| self.samples.targets(sample)).sum::<usize>();
        }
        enter(Phase::Exchange);
        let totals = comm.sum(&[nll, tokens as f64])?;
        let (nll, tokens) = (totals[0], totals[1]);
        let shards = self.samples.shards();
        let words = shards.n_words() as f64 + shards.n_lines() as f64;
        let loss = nll / tokens;
        Ok(EvalRow {
            step,
            split: self.split.into(),
            loss,
            ppl: loss.exp(),
            word_ppl: (self.layout == Layout::Packed).then(|| (nll / words).exp()),
            tokens: tokens as u64,
            eval_s: rounded(start.elapsed().as_secs_f64()),
        })
    }
}
