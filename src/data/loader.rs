//! Which tokens a rank reads at a step: a pure function of the data, the seed, the step, the rank and the world size.
//!
//! Nothing is kept between steps, so a resumed run, or one with another number of ranks, reads what an undisturbed
//! one would have read.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::config::{Layout, Loss};
use crate::data::shard::Shards;
use crate::error::{Error, Result};
use crate::random::mix;

/// B sequences, padded to the longest of them: T positions.
pub struct Batch {
    /// (B, T) int64.
    pub inputs: Tensor,
    /// (B, T) int64: the token after each input; 0 at padding.
    pub targets: Tensor,
    /// (B, T) fp32: what each target's loss counts; 0 at padding. On a GPU one number with strides of 0, if all are
    /// equal.
    pub weights: Tensor,
    /// (N,) int64: the positions of the flattened (B T,) targets that count; `None` if all do. The host knows, and a device
    /// need not be asked and waited for.
    pub counted: Option<Tensor>,
}

/// One split cut into samples: runs of tokens, each the input of the next.
pub struct Samples {
    shards: Shards,
    cut: Cut,
}

enum Cut {
    /// Blocks of this many targets, `stride` tokens from one to the next: all but the last `stride` targets of a block are
    /// those of blocks before, and only context. The last block may be shorter if `tail` keeps it.
    Blocks { length: usize, stride: usize, count: usize },
    /// (first token, tokens) of each piece.
    Pieces(Vec<(usize, u32)>),
}

impl Samples {
    /// Cuts a split for training: `packed` leaves out the last, incomplete block.
    ///
    /// # Errors
    /// Data, if the split is too short for a single sample.
    pub fn for_training(shards: impl Into<Shards>, layout: Layout, block_size: usize) -> Result<Self> {
        Self::cut(shards.into(), layout, block_size, false)
    }

    /// Cuts a split for evaluation: every token but the first of the stream (`packed`) or of a piece (`paragraphs`)
    /// is a target.
    ///
    /// # Errors
    /// As [`Samples::for_training`].
    pub fn for_evaluation(shards: impl Into<Shards>, layout: Layout, block_size: usize) -> Result<Self> {
        Self::cut(shards.into(), layout, block_size, true)
    }

    /// Cuts a split for evaluation with a window that slides over the stream: each token but the first is a target once,
    /// and sees at least `block_size - stride` tokens before it (if so many are there). `stride` is 1 to `block_size`, and
    /// `block_size` gives the blocks of [`Samples::for_evaluation`].
    ///
    /// # Errors
    /// As [`Samples::for_training`].
    pub fn for_sliding(shards: impl Into<Shards>, block_size: usize, stride: usize) -> Result<Self> {
        let shards = shards.into();
        let targets = shards.n_tokens().saturating_sub(1);
        let count = targets.min(1) + targets.saturating_sub(block_size).div_ceil(stride);
        Self::checked(shards, Layout::Packed, Cut::Blocks { length: block_size, stride, count }, block_size, true)
    }

    fn cut(shards: Shards, layout: Layout, block_size: usize, tail: bool) -> Result<Self> {
        let targets = shards.n_tokens().saturating_sub(1);
        let cut = match layout {
            Layout::Packed => {
                let count = if tail { targets.div_ceil(block_size) } else { targets / block_size };
                Cut::Blocks { length: block_size, stride: block_size, count }
            }
            Layout::Paragraphs => Cut::Pieces(pieces(&shards, block_size)?),
        };
        Self::checked(shards, layout, cut, block_size, tail)
    }

    fn checked(shards: Shards, layout: Layout, cut: Cut, block_size: usize, tail: bool) -> Result<Self> {
        let samples = Self { shards, cut };
        if samples.shards.n_tokens() == 0 {
            let message = "the split is empty; set some text aside for it with `lockstep prepare --test 5%`";
            return Err(Error::Data(message.into()).into());
        }
        if samples.is_empty() {
            let (need, lines) = match layout {
                Layout::Packed => (if tail { 2 } else { block_size + 1 }, String::new()),
                Layout::Paragraphs => (2, format!(" on {} lines, none of which has two", samples.shards.n_lines())),
            };
            return Err(Error::Data(format!(
                "a sample of data.block_size {block_size} needs {need} tokens, the split has {}{lines}; \
                 use a smaller data.block_size or more text",
                samples.shards.n_tokens()
            ))
            .into());
        }
        Ok(samples)
    }

    /// The number of samples: one epoch.
    pub fn len(&self) -> usize {
        match &self.cut {
            Cut::Blocks { count, .. } => *count,
            Cut::Pieces(pieces) => pieces.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The split that the samples are cut from.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The tokens of a sample, one more than it has targets.
    fn tokens(&self, sample: usize) -> Range<usize> {
        match &self.cut {
            Cut::Blocks { length, stride, .. } => {
                let start = sample * stride;
                start..(start + length + 1).min(self.shards.n_tokens())
            }
            Cut::Pieces(pieces) => {
                let (start, length) = pieces[sample];
                start..start + length as usize
            }
        }
    }

    /// Where a sample's targets are in the split. They are the last of its tokens.
    pub fn target_places(&self, sample: usize) -> Range<usize> {
        let tokens = self.tokens(sample);
        let context = match &self.cut {
            Cut::Blocks { length, stride, .. } if sample > 0 => length - stride,
            _ => 0,
        };
        tokens.start + 1 + context..tokens.end
    }

    /// How many targets a sample has.
    pub fn targets(&self, sample: usize) -> usize {
        self.target_places(sample).len()
    }

    /// Reads samples as one batch; `weight` gives what each target of a sample of n targets counts.
    ///
    /// # Errors
    /// Data, if a shard was cut or changed, or cannot be read.
    pub fn batch(
        &self,
        samples: &[usize],
        padding: i64,
        device: Device,
        weight: impl Fn(usize) -> f32,
    ) -> Result<Batch> {
        let width = samples.iter().map(|&sample| self.tokens(sample).len() - 1).max().unwrap_or(0);
        let size = samples.len() * width;
        // Inputs, then targets: one copy takes both to a GPU.
        let mut ids = vec![0i64; 2 * size];
        let (inputs, targets) = ids.split_at_mut(size);
        inputs.fill(padding);
        let mut weights = vec![0f32; size];
        let mut tokens = Vec::with_capacity(width + 1);
        for (row, &sample) in samples.iter().enumerate() {
            tokens.clear();
            self.shards.tokens(self.tokens(sample), &mut tokens)?;
            let n = tokens.len() - 1;
            let place = row * width..row * width + n;
            inputs[place.clone()].copy_from_slice(&tokens[..n]);
            targets[place.clone()].copy_from_slice(&tokens[1..]);
            let counted = self.targets(sample);
            weights[place.end - counted..place.end].fill(weight(counted));
        }
        // Nothing of another content is learnt from: ids of it may even be beyond the vocabulary.
        self.shards.check_unchanged()?;
        let counted: Vec<i64> = (0..size as i64).filter(|&place| weights[place as usize] > 0.0).collect();
        let counted = (counted.len() < size).then(|| send(Tensor::from_slice(&counted), device));
        let shape = [samples.len() as i64, width as i64];
        let ids = send(Tensor::from_slice(&ids), device).view([2, shape[0], shape[1]]);
        let weights = match weights.first() {
            Some(&one) if device.is_cuda() && weights.iter().all(|&weight| weight == one) => {
                Tensor::full([1, 1], f64::from(one), (Kind::Float, device)).expand(shape, false)
            }
            _ => send(Tensor::from_slice(&weights), device).view(shape),
        };
        Ok(Batch { inputs: ids.get(0), targets: ids.get(1), weights, counted })
    }
}

/// Takes a tensor to a device, by way of pinned memory to a GPU: the host then goes on while the copy is under way.
fn send(tensor: Tensor, device: Device) -> Tensor {
    if device == Device::Cpu {
        return tensor;
    }
    // The system may refuse to pin more; a copy then waits, and is right all the same.
    let pinned = tensor.f_internal_pin_memory(device).unwrap_or(tensor);
    pinned.internal_to_copy((pinned.kind(), device), true)
}

/// Each line's pieces of at most `block_size` tokens, pieces of one token dropped.
fn pieces(shards: &Shards, block_size: usize) -> Result<Vec<(usize, u32)>> {
    let mut pieces = Vec::new();
    shards.for_each_line(|line| {
        let starts = line.clone().step_by(block_size);
        let cut = starts.map(|start| (start, (line.end - start).min(block_size) as u32));
        pieces.extend(cut.filter(|&(_, length)| length > 1));
    })?;
    Ok(pieces)
}

/// The training samples in the order of the steps, and this rank's share of each step.
pub struct Loader {
    /// What is sampled.
    pub samples: Samples,
    /// Fixes the order of every epoch.
    pub seed: u64,
    /// Sequences a step, over all ranks.
    pub batch_size: usize,
    /// Sequences a micro-step, of one rank.
    pub micro_batch: usize,
    /// What the weights in a batch express.
    pub loss: Loss,
    /// The token that fills short rows.
    pub padding: i64,
    #[allow(missing_docs)]
    pub rank: usize,
    #[allow(missing_docs)]
    pub world_size: usize,
}

impl Loader {
    /// The samples of the global batch after `step` steps done, in order.
    ///
    /// Position i of the batch is sample number step * batch_size + i of an endless sequence of epochs, each a
    /// permutation of its own.
    pub fn global_batch(&self, step: usize) -> Vec<usize> {
        let epoch_length = self.samples.len() as u64;
        let first = step as u64 * self.batch_size as u64;
        (first..first + self.batch_size as u64)
            .map(|number| permute(self.seed, number / epoch_length, number % epoch_length, epoch_length) as usize)
            .collect()
    }

    /// The first number of steps after which [`Loader::targets`] add up to at least so many; as [`Loader::global_batch`], this
    /// is a function of the data and the seed.
    pub fn steps_to_targets(&self, targets: u64) -> usize {
        let n = self.samples.len() as u64;
        let all: u64 = (0..self.samples.len()).map(|sample| self.samples.targets(sample) as u64).sum();
        let targets = targets.max(1);
        let (epochs, mut left) = ((targets - 1) / all, (targets - 1) % all + 1);
        let mut samples = 0;
        while left > 0 {
            let sample = permute(self.seed, epochs, samples, n) as usize;
            left = left.saturating_sub(self.samples.targets(sample) as u64);
            samples += 1;
        }
        self.steps_to_samples(epochs * n + samples)
    }

    /// The first number of steps that see every sample so many times.
    pub fn steps_to_epochs(&self, epochs: usize) -> usize {
        self.steps_to_samples(epochs as u64 * self.samples.len() as u64)
    }

    fn steps_to_samples(&self, samples: u64) -> usize {
        samples.div_ceil(self.batch_size as u64) as usize
    }

    /// This rank's contiguous share of a global batch.
    pub fn share<'a>(&self, global: &'a [usize]) -> &'a [usize] {
        let share = self.batch_size / self.world_size;
        &global[self.rank * share..(self.rank + 1) * share]
    }

    /// Targets in a global batch: what a step adds to the count of tokens.
    pub fn targets(&self, global: &[usize]) -> usize {
        global.iter().map(|&sample| self.samples.targets(sample)).sum()
    }

    /// One micro-batch of this rank's share. Its weights make the plain sum over micro-steps and ranks the objective.
    ///
    /// # Errors
    /// As [`Samples::batch`].
    pub fn micro_batch(&self, global: &[usize], micro_step: usize, device: Device) -> Result<Batch> {
        let mine = &self.share(global)[micro_step * self.micro_batch..(micro_step + 1) * self.micro_batch];
        let targets = self.targets(global) as f32;
        let sequences = self.batch_size as f32;
        self.samples.batch(mine, self.padding, device, |n| match self.loss {
            Loss::TokenMean => 1.0 / targets,
            Loss::SequenceMean => 1.0 / (n as f32 * sequences),
        })
    }
}

/// Where `index` goes in the permutation of 0..n that belongs to (seed, epoch).
///
/// A Feistel network over the smallest even power of two that holds n, walked until it lands below n (Black and
/// Rogaway 2002): random access to a shuffle without a table.
fn permute(seed: u64, epoch: u64, index: u64, n: u64) -> u64 {
    const ROUNDS: u64 = 6;
    let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2).div_ceil(2);
    let mask = (1u64 << bits) - 1;
    let key = mix(seed, epoch);
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> bits, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key.wrapping_add(round), right) & mask));
        }
        value = left << bits | right;
        if value < n {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_permutation() {
        for n in [1, 2, 3, 5, 64, 100, 1023, 1024, 1025] {
            for epoch in 0..3 {
                let mut seen: Vec<u64> = (0..n).map(|index| permute(7, epoch, index, n)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..n).collect::<Vec<_>>(), "n = {n}, epoch {epoch}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_neighbours_scatter() {
        let n = 10_000;
        let order = |seed, epoch| (0..n).map(|index| permute(seed, epoch, index, n)).collect::<Vec<_>>();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        let jumps = order(1, 0).windows(2).map(|w| w[0].abs_diff(w[1])).sum::<u64>() as f64 / (n - 1) as f64;
        // Two uniform draws are n / 3 apart on average.
        assert!((jumps / n as f64 - 1.0 / 3.0).abs() < 0.02, "{jumps}");
    }
}
