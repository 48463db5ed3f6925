//! AdamW on flat memory (Loshchilov and Hutter 2019), or on a rank's ranges of it.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use tch::{no_grad, Device, Kind, Tensor};

use crate::config::Optim;
use crate::model::parameters::Parameters;
use crate::torch::{self, bf16, AdamWNumbers, Kernels, Update};

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
    /// (2 m,) int64: begin and end of each of these, where the parameters are.
    cuts: Tensor,
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
        let decayed: Vec<Range<i64>> = decayed.collect();
        let cuts: Vec<i64> = decayed.iter().flat_map(|part| [part.start, part.end]).collect();
        let cuts = Tensor::from_slice(&cuts).to_device(parameters.flat.device());
        Self { decayed, cuts, exp_avg: zeros(), exp_avg_sq: zeros(), optim: optim.clone(), ranges }
    }

    /// Takes over both moments of the flat elements from `start` on, as far as they are in this optimizer's ranges.
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

    /// One update with the gradient in `parameters`, scaled down to a global norm of `optim.grad_clip` if `norm`, (1,)
    /// fp64, is more than that. Nothing changes if `norm` is not finite; on a GPU that is decided there, and the host
    /// does not wait for it. `step` counts from 1 and corrects the moments' bias. Publish the parameters afterwards.
    pub fn step(&mut self, parameters: &mut Parameters, step: usize, lr: f64, norm: &Tensor) {
        let device = parameters.flat.device();
        let own = parameters.copy().and_then(|copy| Some((copy, torch::kernels(device)?)));
        no_grad(|| match own {
            Some((copy, kernels)) => {
                self.step_in_own_kernel(parameters, &copy, step, lr, norm, kernels);
                parameters.copy_is_made = true;
            }
            None if device.is_cuda() => self.step_in_one_kernel(parameters, step, lr, norm),
            None => self.step_on_cores(parameters, step, lr, norm.double_value(&[0])),
        });
    }

    /// The update and the bf16 copy of the weights in one pass.
    fn step_on_cores(&mut self, parameters: &mut Parameters, step: usize, lr: f64, norm: f64) {
        if !norm.is_finite() {
            return;
        }
        let Optim { betas: [beta1, beta2], eps, weight_decay, grad_clip, .. } = self.optim;
        let scale = grad_clip / (norm + TINY);
        let correction2 = (1.0 - beta2.powf(step as f64)).sqrt();
        for (decay, weight_decay) in [(true, weight_decay), (false, 0.0)] {
            let rule = Rule {
                scale: if grad_clip > 0.0 && scale < 1.0 { scale as f32 } else { 1.0 },
                shrink: (1.0 - lr * weight_decay) as f32,
                beta2: beta2 as f32,
                rests: [(1.0 - beta1) as f32, (1.0 - beta2) as f32],
                rate: (lr / (1.0 - beta1.powf(step as f64))) as f32,
                correction: correction2 as f32,
                eps: eps as f32,
            };
            for (range, place) in self.parts(decay) {
                let moment = |all: &Tensor| all.narrow(0, place, range.end - range.start);
                let [mut flat, grad] = [&parameters.flat, &parameters.grad].map(|all| slice(all, &range));
                let [mut mean, mut square] = [&self.exp_avg, &self.exp_avg_sq].map(moment);
                let weights = torch::floats_mut(&mut flat).par_chunks_mut(PIECE);
                let grads = torch::floats(&grad).par_chunks(PIECE);
                let means = torch::floats_mut(&mut mean).par_chunks_mut(PIECE);
                let squares = torch::floats_mut(&mut square).par_chunks_mut(PIECE);
                let pieces = weights.zip(grads).zip(means.zip(squares));
                let update = |((weights, grads), (means, squares))| Piece {
                    weights,
                    grads,
                    means,
                    squares,
                    copy: &mut [],
                    rule,
                };
                let arch = Arch::new();
                match parameters.copy() {
                    None => pieces.for_each(|piece| arch.dispatch(update(piece))),
                    Some(copy) => {
                        let mut copy = slice(&copy, &range);
                        let copies = torch::halves_mut(&mut copy).par_chunks_mut(PIECE);
                        pieces.zip(copies).for_each(|(piece, copy)| arch.dispatch(Piece { copy, ..update(piece) }));
                    }
                }
            }
        }
        parameters.copy_is_made = true;
    }

    /// The update and the bf16 copy of the weights in one kernel of our own.
    fn step_in_own_kernel(
        &self,
        parameters: &Parameters,
        copy: &Tensor,
        step: usize,
        lr: f64,
        norm: &Tensor,
        kernels: &Kernels,
    ) {
        let Optim { betas, eps, weight_decay, grad_clip: clip, .. } = self.optim;
        let mut done = 0;
        for range in &self.ranges {
            let moment = |all: &Tensor| all.narrow(0, done, range.end - range.start);
            let [flat, grad] = [&parameters.flat, &parameters.grad].map(|all| slice(all, range));
            kernels.adamw(&Update {
                parts: [flat, grad, moment(&self.exp_avg), moment(&self.exp_avg_sq)],
                copy: slice(copy, range),
                norm,
                cuts: &self.cuts,
                from: range.start,
                numbers: AdamWNumbers { lr, betas, weight_decay, eps },
                clip,
                step,
            });
            done += range.end - range.start;
        }
    }

    fn step_in_one_kernel(&mut self, parameters: &mut Parameters, step: usize, lr: f64, norm: &Tensor) {
        let skip = norm.isfinite().logical_not().to_kind(Kind::Float);
        let largest = self.optim.grad_clip;
        let scale = if largest > 0.0 { ((norm + TINY) / largest).clamp_min(1.0) } else { norm.ones_like() };
        let step = Tensor::full([], step as f64, (Kind::Float, norm.device()));
        let Optim { betas, eps, weight_decay, .. } = self.optim;
        for (decay, weight_decay) in [(true, weight_decay), (false, 0.0)] {
            let parts: Vec<_> = self
                .parts(decay)
                .map(|(range, place)| {
                    let moment = |all: &Tensor| all.narrow(0, place, range.end - range.start);
                    let [flat, grad] = [&parameters.flat, &parameters.grad].map(|all| slice(all, &range));
                    [flat, grad, moment(&self.exp_avg), moment(&self.exp_avg_sq)]
                })
                .collect();
            let numbers = AdamWNumbers { lr, betas, weight_decay, eps };
            torch::fused_adamw(&parts, &step, &numbers, &scale.to_kind(Kind::Float), &skip);
        }
    }

    /// The parts of the ranges that weight decay applies to, or those that it does not, and where each one's moments begin.
    fn parts(&self, decay: bool) -> impl Iterator<Item = (Range<i64>, i64)> + '_ {
        let mut done = 0;
        self.ranges.iter().flat_map(move |range| {
            let mut cuts = vec![(range.start, false)];
            for part in self.decayed.iter().filter(|part| range.start <= part.start && part.end <= range.end) {
                cuts.extend([(part.start, true), (part.end, false)]);
            }
            let ends: Vec<i64> = cuts.iter().skip(1).map(|cut| cut.0).chain([range.end]).collect();
            let place = done - range.start;
            done += range.end - range.start;
            let parts = cuts.into_iter().zip(ends).filter(move |((start, kind), end)| *kind == decay && start < end);
            parts.map(move |((start, _), end)| (start..end, start + place))
        })
    }
}

/// Elements that a core updates at a time: they stay in its cache until they are copied.
const PIECE: usize = 1 << 14;

/// An update's numbers: the gradient's factor, the weights', the second moment's decay rate, 1 less each moment's, the learning rate with
/// the mean's correction, the second moment's correction.
#[derive(Clone, Copy)]
struct Rule {
    scale: f32,
    shrink: f32,
    beta2: f32,
    rests: [f32; 2],
    rate: f32,
    correction: f32,
    eps: f32,
}

/// A piece of the flat tensors, and of the bf16 copy if it is to be made.
struct Piece<'a> {
    weights: &'a mut [f32],
    grads: &'a [f32],
    means: &'a mut [f32],
    squares: &'a mut [f32],
    copy: &'a mut [u16],
    rule: Rule,
}

/// Compiled for each set of vector instructions; plain loops, which the compiler makes vectors of.
impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Rule { scale, shrink, beta2, rests, rate, correction, eps } = self.rule;
        let moments = self.means.iter_mut().zip(self.squares);
        for ((weight, &grad), (mean, square)) in self.weights.iter_mut().zip(self.grads).zip(moments) {
            let grad = scale * grad;
            *mean += rests[0] * (grad - *mean);
            *square = beta2 * *square + rests[1] * grad * grad;
            *weight = shrink * *weight - rate * *mean / (square.sqrt() / correction + eps);
        }
        for (copy, &weight) in self.copy.iter_mut().zip(&*self.weights) {
            *copy = bf16(weight);
        }
    }
}

/// Added to a norm before something is divided by it, as PyTorch's `clip_grad_norm_` does.
const TINY: f64 = 1e-6;

/// The gradient's squares in these ranges, summed in double precision, so that neither many small ones nor the squares of
/// large ones get lost: on the CPU one sum for each [`UNIT`] of the whole gradient, (units,), 0 if a unit is in no
/// range; on a GPU, which promises no bits, one sum of all, (1,). Ranges begin at multiples of a unit. Added over ranks
/// whose ranges cover the gradient once, these are the squares of all of it.
pub fn squares(parameters: &Parameters, ranges: &[Range<i64>]) -> Tensor {
    no_grad(|| {
        if parameters.grad.device().is_cuda() {
            let mut sum = Tensor::zeros([1], (Kind::Double, parameters.grad.device()));
            // Many small squares get lost in a larger fp32 sum; a GPU pays for every launch.
            let pieces = ranges
                .iter()
                .flat_map(|range| range.clone().step_by(1 << 24).map(|start| start..range.end.min(start + (1 << 24))));
            for piece in pieces {
                let _ = sum.g_add_(&slice(&parameters.grad, &piece).norm().to_kind(Kind::Double).square());
            }
            return sum;
        }
        let units = Tensor::zeros([(parameters.numel() + UNIT - 1) / UNIT], (Kind::Double, Device::Cpu));
        for range in ranges {
            let whole = (range.end - range.start) / UNIT * UNIT;
            let mut first = range.start / UNIT;
            for (part, width) in [
                (range.start..range.start + whole, UNIT),
                (range.start + whole..range.end, range.end - range.start - whole),
            ] {
                if part.is_empty() {
                    continue;
                }
                let rows = slice(&parameters.grad, &part).view([-1, width]);
                let squares = rows.norm_scalaropt_dim(2.0, [1i64], false).to_kind(Kind::Double).square();
                let n = squares.size()[0];
                units.narrow(0, first, n).copy_(&squares);
                first += n;
            }
        }
        units
    })
}

/// The norm, (1,) fp64, of a gradient with these [`squares`]; added one after another, whatever the number of threads.
pub fn norm(squares: &Tensor) -> Tensor {
    if squares.device().is_cuda() {
        return squares.sqrt();
    }
    let squares: Vec<f64> = Vec::try_from(squares).unwrap_or_default();
    Tensor::from_slice(&[squares.iter().sum::<f64>().sqrt()])
}

fn slice(flat: &Tensor, range: &Range<i64>) -> Tensor {
    flat.narrow(0, range.start, range.end - range.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const ALL: Range<i64> = 0..9377;
    const MIDDLE: Range<i64> = 4096..8192;

    /// Three parameters, of which the first and the last decay, with a gradient.
    fn parameters(kind: Kind) -> Parameters {
        let shapes = [("a", vec![70, 90], true), ("b", vec![77], false), ("c", vec![50, 60], true)];
        let shapes = shapes.map(|(name, shape, decay)| (name.to_string(), shape, decay));
        let mut parameters = Parameters::new(shapes.into(), Device::Cpu, kind);
        // LibTorch's generator is one for all tests, which run side by side.
        let numbers = Tensor::arange(parameters.numel(), (Kind::Float, Device::Cpu));
        no_grad(|| {
            parameters.flat.copy_(&(&numbers * 0.7).sin());
            parameters.grad.copy_(&(&numbers * 1.3).cos());
        });
        parameters
    }

    fn optimizer(parameters: &Parameters, ranges: &[Range<i64>], grad_clip: f64) -> AdamW {
        let optim = Config::parse(&format!("optim: {{grad_clip: {grad_clip}}}"), &[]).unwrap().optim;
        AdamW::new(parameters, ranges.to_vec(), &optim)
    }

    type Step = fn(&mut AdamW, &mut Parameters, usize, f64, &Tensor);
    const ON_CORES: Step = |optimizer, parameters, step, lr, norm| {
        no_grad(|| optimizer.step_on_cores(parameters, step, lr, norm.double_value(&[0])));
    };
    const IN_ONE_KERNEL: Step = |optimizer, parameters, step, lr, norm| {
        no_grad(|| optimizer.step_in_one_kernel(parameters, step, lr, norm));
    };

    /// LibTorch has the kernel that GPUs get for CPUs, too.
    #[test]
    fn both_ways_make_the_same_step() {
        for ranges in [&[ALL][..], &[0..4096, 8192..9377], &[MIDDLE]] {
            for grad_clip in [0.0, 1.0, 1e6] {
                let run = |step: Step| {
                    let mut parameters = parameters(Kind::Float);
                    let mut optimizer = optimizer(&parameters, ranges, grad_clip);
                    for n in 1..=5 {
                        let gradient = &parameters.grad * 1.0;
                        let norm = norm(&squares(&parameters, ranges));
                        step(&mut optimizer, &mut parameters, n, 1e-2, &norm);
                        no_grad(|| parameters.grad.copy_(&(gradient * -0.7)));
                    }
                    [parameters.flat, optimizer.exp_avg, optimizer.exp_avg_sq]
                };
                for (one, other) in run(ON_CORES).iter().zip(run(IN_ONE_KERNEL)) {
                    let distance = ((one - &other).norm() / one.norm()).double_value(&[]);
                    assert!(distance < 1e-6, "{ranges:?}, clipped to {grad_clip}: {distance:e}");
                }
            }
        }
    }

    #[test]
    fn the_bf16_copy_is_that_of_the_weights_whoever_makes_it() {
        for ranges in [&[ALL][..], &[MIDDLE]] {
            let mut parameters = parameters(Kind::BFloat16);
            parameters.publish();
            let norm = norm(&squares(&parameters, ranges));
            optimizer(&parameters, ranges, 1.0).step(&mut parameters, 1, 1e-2, &norm);
            assert!(parameters.copy_is_made);
            parameters.publish();
            assert!(parameters.copy().unwrap().equal(&parameters.flat.to_kind(Kind::BFloat16)));
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        for step in [ON_CORES, IN_ONE_KERNEL] {
            for bad in [f64::NAN, f64::INFINITY] {
                let mut parameters = parameters(Kind::Float);
                let mut optimizer = optimizer(&parameters, &[ALL], 1.0);
                step(&mut optimizer, &mut parameters, 1, 1e-2, &Tensor::from_slice(&[3.0f64]));
                let state = |parameters: &Parameters, optimizer: &AdamW| {
                    Tensor::cat(&[&parameters.flat, &optimizer.exp_avg, &optimizer.exp_avg_sq], 0)
                };
                let before = state(&parameters, &optimizer);
                let _ = no_grad(|| parameters.grad.narrow(0, 8000, 1).fill_(bad));
                let norm = norm(&squares(&parameters, &optimizer.ranges));
                assert!(!norm.double_value(&[0]).is_finite());
                step(&mut optimizer, &mut parameters, 2, 1e-2, &norm);
                assert!(state(&parameters, &optimizer).equal(&before));
            }
        }
    }
}
