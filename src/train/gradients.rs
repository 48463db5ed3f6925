//! The gradient's way over the ranks: buckets that travel while the backward pass goes on, and ZeRO-1's parts.
//!
//! The flat gradient is cut into buckets in the order in which the backward pass finishes it, and each is summed as soon
//! as it is whole (Li et al. 2020, "PyTorch Distributed"). Under ZeRO-1 (Rajbhandari et al. 2020) a bucket's sum goes to
//! the ranks in parts: rank r updates the r-th part of every bucket, keeps the optimizer's state of those parts alone,
//! and the updated weights are gathered.

use std::ops::Range;

use tch::{no_grad, Kind, Tensor};

use crate::comm::{even_parts, Comm};
use crate::config::{CommOptions, GradDtype};
use crate::error::Result;
use crate::model::parameters::Parameters;
use crate::optim::adamw::UNIT;

/// A slice of the flat tensors.
struct Bucket {
    start: i64,
    length: i64,
    /// Where in the bucket each rank's part begins; world_size + 1 bounds.
    parts: Vec<usize>,
}

impl Bucket {
    fn of(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.start, self.length)
    }
}

/// How many of the optimizer's elements a rank keeps, of `numel`.
pub fn kept_elements(numel: i64, options: &CommOptions, zero1: bool, rank: usize, world_size: usize) -> i64 {
    match zero1 && world_size > 1 {
        true => {
            let part = |bucket: Bucket| bucket.parts[rank + 1] - bucket.parts[rank];
            buckets(numel, options.bucket_mib, world_size).into_iter().map(part).sum::<usize>() as i64
        }
        false => numel,
    }
}

/// The buckets of one model, and how far a step has come with them.
pub struct Gradients {
    buckets: Vec<Bucket>,
    overlap: bool,
    /// Whether each rank holds its part of the optimizer's state only.
    sharded: bool,
    /// What travels, if that is not the gradient itself: its bf16 copy, (P,).
    wire: Option<Tensor>,
    /// Buckets that this step has sent.
    sent: usize,
    /// The first failure to send, kept until [`Gradients::sum`]: the backward pass cannot return it.
    failure: Option<anyhow::Error>,
}

impl Gradients {
    /// Cuts `parameters` into buckets for the ranks of `comm`.
    pub fn new(comm: &Comm, parameters: &Parameters, options: &CommOptions, zero1: bool) -> Self {
        let wire = (comm.is_joined() && options.grad_dtype == GradDtype::Bf16 && parameters.grad.device().is_cuda())
            .then(|| Tensor::zeros([parameters.numel()], (Kind::BFloat16, parameters.grad.device())));
        Self {
            buckets: buckets(parameters.numel(), options.bucket_mib, comm.world_size),
            overlap: options.overlap,
            sharded: zero1 && comm.world_size > 1,
            wire,
            sent: 0,
            failure: None,
        }
    }

    /// Whether each rank holds its part of the optimizer's state only.
    pub fn is_sharded(&self) -> bool {
        self.sharded
    }

    /// The ranges of the flat tensors that `rank` updates, ascending.
    pub fn owned(&self, rank: usize) -> Vec<Range<i64>> {
        let mut owned: Vec<Range<i64>> = Vec::new();
        for bucket in &self.buckets {
            let (from, to) =
                if self.sharded { (bucket.parts[rank], bucket.parts[rank + 1]) } else { (0, bucket.length as usize) };
            let part = bucket.start + from as i64..bucket.start + to as i64;
            match owned.last_mut().filter(|last| last.end == part.start) {
                Some(last) => last.end = part.end,
                None => owned.push(part),
            }
        }
        owned.retain(|part| !part.is_empty());
        owned
    }

    /// (start, length) of every bucket.
    pub fn buckets(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.buckets.iter().map(|bucket| (bucket.start, bucket.length))
    }

    /// Sends the buckets below `end`: the backward pass has finished the gradient up to there.
    pub fn ready(&mut self, comm: &Comm, grad: &Tensor, end: i64) {
        if self.overlap {
            self.send(comm, grad, end);
        }
    }

    fn send(&mut self, comm: &Comm, grad: &Tensor, end: i64) {
        if !comm.is_joined() || self.failure.is_some() {
            return;
        }
        while let Some(bucket) = self.buckets.get(self.sent).filter(|bucket| bucket.start + bucket.length <= end) {
            let mut part = bucket.of(grad);
            if let Some(wire) = &self.wire {
                let mut copy = bucket.of(wire);
                no_grad(|| copy.copy_(&part));
                part = copy;
            }
            let begun = match self.sharded {
                true => comm.begin_reduce_scatter(&part, &bucket.parts),
                false => comm.begin_all_reduce(&part),
            };
            self.sent += 1;
            if let Err(error) = begun {
                self.failure = Some(error);
                return;
            }
        }
    }

    /// Sends what is left, and waits until the gradient is the sum over the ranks: all of it, or this rank's parts.
    ///
    /// # Errors
    /// Communication, if a collective failed or a peer does not answer in time.
    pub fn sum(&mut self, comm: &Comm, grad: &mut Tensor) -> Result<()> {
        self.send(comm, grad, i64::MAX);
        self.sent = 0;
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        comm.complete()?;
        if let Some(wire) = &self.wire {
            for Range { start, end } in self.owned(comm.rank) {
                no_grad(|| grad.narrow(0, start, end - start).copy_(&wire.narrow(0, start, end - start)));
            }
        }
        Ok(())
    }

    /// Gathers weights, (P,), if each rank has updated only its own part of them.
    ///
    /// # Errors
    /// As [`Gradients::sum`].
    pub fn gather(&self, comm: &Comm, weights: &Tensor) -> Result<()> {
        if !self.sharded {
            return Ok(());
        }
        for bucket in &self.buckets {
            comm.begin_all_gather(&bucket.of(weights), &bucket.parts)?;
        }
        comm.complete()
    }
}

/// Cuts `numel` elements of 4 bytes into buckets of about `mib` MiB. All but the last are whole multiples of a unit for
/// each rank, so that their parts are equal, and a unit of the gradient's norm is never cut.
fn buckets(numel: i64, mib: usize, world_size: usize) -> Vec<Bucket> {
    let step = UNIT * world_size as i64;
    let length = ((mib as i64) << 18) / step * step;
    let length = length.max(step);
    let bucket = |start: i64| {
        let length = length.min(numel - start);
        let units = (length as usize).div_ceil(UNIT as usize);
        let parts = even_parts(units, world_size).into_iter().map(|bound| (bound * UNIT as usize).min(length as usize));
        Bucket { start, length, parts: parts.collect() }
    };
    (0..numel).step_by(length as usize).map(bucket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_element_once() {
        for numel in [1, 4095, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 77] {
            for world_size in [1, 2, 3, 4, 7, 64] {
                for mib in [1, 3] {
                    let buckets = buckets(numel, mib, world_size);
                    let mut next = 0;
                    for (place, bucket) in buckets.iter().enumerate() {
                        assert_eq!(bucket.start, next);
                        next += bucket.length;
                        assert_eq!((bucket.parts[0], bucket.parts[world_size]), (0, bucket.length as usize));
                        let lengths: Vec<usize> = bucket.parts.windows(2).map(|w| w[1] - w[0]).collect();
                        let last = place + 1 == buckets.len();
                        assert!(last || lengths.iter().all(|&n| n == lengths[0]), "{lengths:?}");
                        assert!(bucket.parts.iter().all(|&n| n % UNIT as usize == 0 || n == bucket.length as usize));
                    }
                    assert_eq!(next, numel);
                    let options = CommOptions { bucket_mib: mib, ..CommOptions::default() };
                    let kept = |rank| kept_elements(numel, &options, true, rank, world_size);
                    assert_eq!((0..world_size).map(kept).sum::<i64>(), numel);
                }
            }
        }
    }
}
