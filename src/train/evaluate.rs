//! Evaluation: every target of a split once, shared by all ranks.

use std::ops::AddAssign;
use std::time::Instant;

use tch::Device;

use crate::comm::Comm;
use crate::config::Layout;
use crate::data::loader::Samples;
use crate::error::Result;
use crate::model::head::Score;
use crate::model::Gpt;
use crate::run::progress::EvaluationProgress;
use crate::run::tables::{rounded, EvalRow};
use crate::watch::Phase;

/// A split to evaluate on, and how.
pub struct Evaluation {
    /// `valid`, `test` or a file.
    pub split: String,
    /// The split, cut for evaluation.
    pub samples: Samples,
    /// How it was cut; word-level perplexity is known for one stream only.
    pub layout: Layout,
    /// Bytes of the split's text.
    pub bytes: u64,
    /// Sequences computed at a time.
    pub micro_batch: usize,
    /// The token that fills short rows.
    pub padding: i64,
}

/// What targets came to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Negative log-likelihood, in nats.
    pub nll: f64,
    /// Targets.
    pub tokens: f64,
    /// Targets than which no other token was likelier.
    pub hits: f64,
}

impl Sums {
    /// Nats for each target; `None` without targets.
    pub fn loss(&self) -> Option<f64> {
        (self.tokens > 0.0).then(|| self.nll / self.tokens)
    }

    /// The share of targets that the model finds likeliest; `None` without targets.
    pub fn accuracy(&self) -> Option<f64> {
        (self.tokens > 0.0).then(|| self.hits / self.tokens)
    }

    /// Bits for each of so many bytes of text; `None` without any.
    pub fn bits_per_byte(&self, bytes: u64) -> Option<f64> {
        (bytes > 0).then(|| self.nll / std::f64::consts::LN_2 / bytes as f64)
    }

    /// Perplexity for each of so many words.
    pub fn word_ppl(&self, words: u64) -> f64 {
        (self.nll / words as f64).exp()
    }

    fn count(&mut self, score: Score) {
        *self += Self { nll: score.loss, tokens: 1.0, hits: f64::from(u8::from(score.is_likeliest)) };
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.tokens += other.tokens;
        self.hits += other.hits;
    }
}

impl Evaluation {
    /// Evaluates the model after `step` steps. `enter` is told of each micro-batch that begins, and of the exchange.
    ///
    /// # Errors
    /// As [`Evaluation::measure`].
    pub fn run(&self, comm: &Comm, model: &Gpt, device: Device, step: usize, enter: impl Fn(Phase)) -> Result<EvalRow> {
        let start = Instant::now();
        let sums = self.measure(comm, model, device, &[0], enter)?[0];
        Ok(self.row(step, sums, start))
    }

    /// The sums over each of several parts of the split, which begin at these tokens; the first is 0. Batch i is computed by
    /// rank i modulo the world size, and the ranks' sums are added, never averages.
    ///
    /// # Errors
    /// Communication, where a peer does not answer in time; data, where the split can no longer be read.
    pub fn measure(
        &self,
        comm: &Comm,
        model: &Gpt,
        device: Device,
        starts: &[usize],
        enter: impl Fn(Phase),
    ) -> Result<Vec<Sums>> {
        let all: Vec<usize> = (0..self.samples.len()).collect();
        let mut parts = vec![Sums::default(); starts.len()];
        let mine: Vec<&[usize]> = all.chunks(self.micro_batch).skip(comm.rank).step_by(comm.world_size).collect();
        let mut progress = comm.is_root().then(|| EvaluationProgress::new(&self.split, mine.len()));
        for (done, samples) in mine.into_iter().enumerate() {
            if let Some(progress) = &mut progress {
                progress.batches(done);
            }
            enter(Phase::Evaluation);
            let batch = self.samples.batch(samples, self.padding, device, |_| 1.0)?;
            let scores = model.scores(&batch.inputs, &batch.targets, &batch.weights, batch.counted.as_ref());
            let places = samples.iter().flat_map(|&sample| self.samples.target_places(sample));
            for (place, score) in places.zip(scores) {
                parts[starts.partition_point(|&start| start <= place) - 1].count(score);
            }
        }
        drop(progress);
        enter(Phase::Exchange);
        let numbers: Vec<f64> = parts.iter().flat_map(|part| [part.nll, part.tokens, part.hits]).collect();
        let totals = comm.sum(&numbers)?;
        Ok(totals.chunks_exact(3).map(|part| Sums { nll: part[0], tokens: part[1], hits: part[2] }).collect())
    }

    /// The row of eval.csv for an evaluation that began at `start` and came to these sums.
    pub fn row(&self, step: usize, sums: Sums, start: Instant) -> EvalRow {
        let shards = self.samples.shards();
        let loss = sums.nll / sums.tokens;
        EvalRow {
            step,
            split: self.split.clone(),
            loss,
            ppl: loss.exp(),
            word_ppl: (self.layout == Layout::Packed)
                .then(|| sums.word_ppl(shards.n_words() + shards.n_lines() as u64)),
            tokens: sums.tokens as u64,
            eval_s: rounded(start.elapsed().as_secs_f64()),
            bits_per_byte: sums.bits_per_byte(self.bytes),
        }
    }
}
