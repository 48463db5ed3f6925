//! AdamW on flat memory (Loshchilov and Hutter 2019), or on a rank's ranges of it.

use std::ops::Range;

use tch::{no_grad, Kind, Tensor};

use crate::config::Optim;
use crate::model::parameters::Parameters;

/// Elements whose squares are added by themselves: the gradient's norm is the sum of the units' in their order, so that
/// it has the same bits whichever ranks add up which units.
pub const UNIT: i64 = 4096;

/// Adam's two moments for some ranges of the flat parameters, and its hyperparameters.
pub struct AdamW {
    /// The ranges that this optimizer updates, ascending, together n elements.
    pub ranges: Vec<Range<i64>>,
    /// (n,) fp32: the running mean of the gradients, range after range.
    pub exp_avg: Tensor,
    /// (n,) fp32: the running mean of their squares.
    pub exp_avg_sq: Tensor,
    /// The parts of the ranges that weight decay applies to.
    decayed: Vec<Range<i64>>,
    optim: Optim,
}

impl AdamW {
    /// An optimizer of these ranges that has seen no gradient.
    pub fn new(parameters: &Parameters, ranges: Vec<Range<i64>>, optim: &Optim) -> Self {
        let length: i64 = ranges.iter().map(|range| range.end - range.start).sum();
        let zeros = || Tensor::zeros([length], (Kind::Float, parameters.flat.device()));
        let decayed = parameters.specs.iter().filter(|spec| spec.decay).flat_map(|spec| {
            let both = |range: &Range<i64>| range.start.max(spec.offset)..range.end.min(spec.offset + spec.numel());
            ranges.iter().map(both).filter(|part| part.start < part.end)
        });
        Self { decayed: decayed.collect(), exp_avg: zeros(), exp_avg_sq: zeros(), optim: optim.clone(), ranges }
    }

    /// Takes over both moments of the flat elements from `start` on, as far as they lie in this optimizer's ranges.
    pub fn fill(&mut self, start: i64, exp_avg: &Tensor, exp_avg_sq: &Tensor) {
        let end = start + exp_avg.size()[0];
        let mut done = 0;
        for range in &self.ranges {
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                let place = done + from - range.start;
                for (mine, all) in [(&self.exp_avg, exp_avg), (&self.exp_avg_sq, exp_avg_sq)] {
                    no_grad(|| mine.narrow(0, place, to - from).copy_(&all.narrow(0, from - start, to - from)));
                }
            }
            done += range.end - range.start;
        }
    }

    /// One update with the gradient in `parameters`; `step` counts from 1 and corrects the moments' bias. Publish the
    /// parameters afterwards.
    pub fn step(&mut self, parameters: &mut Parameters, step: usize, lr: f64) {
        let [beta1, beta2] = self.optim.betas;
        let correction1 = 1.0 - beta1.powf(step as f64);
        let correction2 = (1.0 - beta2.powf(step as f64)).sqrt();
        no_grad(|| {
            let shrink = 1.0 - lr * self.optim.weight_decay;
            for part in &self.decayed {
                let _ = slice(&parameters.flat, part).g_mul_scalar_(shrink);
            }
            let mut done = 0;
            for piece in pieces(&self.ranges, &parameters.flat) {
                let length = piece.end - piece.start;
                let grad = slice(&parameters.grad, &piece);
                let mut mean = self.exp_avg.narrow(0, done, length);
                let mut square = self.exp_avg_sq.narrow(0, done, length);
                done += length;
                let _ = mean.lerp_(&grad, 1.0 - beta1);
                let _ = square.g_mul_scalar_(beta2).addcmul_(&(&grad * (1.0 - beta2)), &grad);
                let mut denominator = square.sqrt();
                let _ = denominator.g_div_scalar_(correction2).g_add_scalar_(self.optim.eps);
                let _ = slice(&parameters.flat, &piece).addcdiv_(&(mean * (-lr / correction1)), &denominator);
            }
        });
    }
}

/// The gradient's squares in these ranges, summed in double precision, so that neither many small ones nor the squares of
/// large ones get lost: on the CPU one sum for each [`UNIT`] of the whole gradient, 0 where a unit lies in no range; on a
/// GPU, which promises no bits, one sum of all. Ranges begin at multiples of a unit. Added over ranks whose ranges cover
/// the gradient once, these are the squares of all of it.
pub fn squares(parameters: &Parameters, ranges: &[Range<i64>]) -> Vec<f64> {
    no_grad(|| {
        if parameters.grad.device().is_cuda() {
            let mut sum = Tensor::zeros([1], (Kind::Double, parameters.grad.device()));
            for piece in pieces(ranges, &parameters.grad) {
                let _ = sum.g_add_(&slice(&parameters.grad, &piece).norm().to_kind(Kind::Double).square());
            }
            return vec![sum.double_value(&[0])];
        }
        let mut units = vec![0.0; (parameters.numel() as usize).div_ceil(UNIT as usize)];
        for range in ranges {
            let whole = (range.end - range.start) / UNIT * UNIT;
            let mut first = (range.start / UNIT) as usize;
            for (part, width) in [
                (range.start..range.start + whole, UNIT),
                (range.start + whole..range.end, range.end - range.start - whole),
            ] {
                if part.is_empty() {
                    continue;
                }
                let rows = slice(&parameters.grad, &part).view([-1, width]);
                let norms = rows.norm_scalaropt_dim(2.0, [1i64], false).to_kind(Kind::Double).square();
                let norms: Vec<f64> = Vec::try_from(norms).unwrap_or_default();
                units[first..first + norms.len()].copy_from_slice(&norms);
                first += norms.len();
            }
        }
        units
    })
}

/// Scales the gradient in these ranges down to a global norm of `largest` (0: leaves it), where `norm` is more than that.
pub fn clip(parameters: &mut Parameters, ranges: &[Range<i64>], norm: f64, largest: f64) {
    let scale = largest / (norm + 1e-6);
    if largest > 0.0 && scale < 1.0 {
        for range in ranges {
            let _ = no_grad(|| slice(&parameters.grad, range).g_mul_scalar_(scale));
        }
    }
}

fn slice(flat: &Tensor, range: &Range<i64>) -> Tensor {
    flat.narrow(0, range.start, range.end - range.start)
}

/// The ranges in pieces that are worked on one after another: on the CPU so small that an update's temporaries stay in the
/// caches; on a GPU, which pays for every launch, so large that this does not show.
fn pieces<'a>(ranges: &'a [Range<i64>], flat: &Tensor) -> impl Iterator<Item = Range<i64>> + use<'a> {
    let length: i64 = if flat.device().is_cuda() { 1 << 24 } else { 1 << 18 };
    ranges.iter().flat_map(move |range| {
        let end = range.end;
        range.clone().step_by(length as usize).map(move |start| start..end.min(start + length))
    })
}
