//! AdamW on flat memory (Loshchilov and Hutter 2019).

use tch::{no_grad, Kind, Tensor};

use crate::config::Optim;
use crate::model::parameters::Parameters;

/// (start, length) of the parts that are worked on one after another: on the CPU so small that an update's temporaries
/// stay in the caches; on a GPU, which pays for every launch, so large that this does not show.
fn chunks(parameters: &Parameters) -> impl Iterator<Item = (i64, i64)> {
    let length: i64 = if parameters.flat.device().is_cuda() { 1 << 24 } else { 1 << 18 };
    let whole = parameters.numel();
    (0..whole).step_by(length as usize).map(move |start| (start, length.min(whole - start)))
}

/// Adam's two moments, P elements each, and its hyperparameters.
pub struct AdamW {
    /// (P,) fp32: the running mean of the gradients.
    pub exp_avg: Tensor,
    /// (P,) fp32: the running mean of their squares.
    pub exp_avg_sq: Tensor,
    optim: Optim,
}

impl AdamW {
    /// An optimizer that has seen no gradient.
    pub fn new(parameters: &Parameters, optim: &Optim) -> Self {
        let zeros = || Tensor::zeros_like(&parameters.flat);
        Self { exp_avg: zeros(), exp_avg_sq: zeros(), optim: optim.clone() }
    }

    /// One update with the gradient in `parameters`; `step` counts from 1 and corrects the moments' bias.
    pub fn step(&mut self, parameters: &mut Parameters, step: usize, lr: f64) {
        let [beta1, beta2] = self.optim.betas;
        let correction1 = 1.0 - beta1.powf(step as f64);
        let correction2 = (1.0 - beta2.powf(step as f64)).sqrt();
        no_grad(|| {
            let shrink = 1.0 - lr * self.optim.weight_decay;
            for spec in parameters.specs.iter().filter(|spec| spec.decay) {
                let _ = spec.view(&parameters.flat).g_mul_scalar_(shrink);
            }
            for (start, length) in chunks(parameters) {
                let part = |flat: &Tensor| flat.narrow(0, start, length);
                let grad = part(&parameters.grad);
                let (mut mean, mut square) = (part(&self.exp_avg), part(&self.exp_avg_sq));
                let _ = mean.lerp_(&grad, 1.0 - beta1);
                let _ = square.g_mul_scalar_(beta2).addcmul_(&(&grad * (1.0 - beta2)), &grad);
                let mut denominator = square.sqrt();
                let _ = denominator.g_div_scalar_(correction2).g_add_scalar_(self.optim.eps);
                let _ = part(&parameters.flat).addcdiv_(&(mean * (-lr / correction1)), &denominator);
            }
        });
        parameters.publish();
    }
}

/// Scales the gradient to a global norm of at most `largest` (0: leaves it) and returns its norm before that.
///
/// A norm that is not finite leaves the gradient alone. Parts are added in double precision, so that neither many small
/// gradients nor the squares of large ones get lost.
pub fn clip(parameters: &mut Parameters, largest: f64) -> f64 {
    no_grad(|| {
        let mut squares = Tensor::zeros([0i64; 0], (Kind::Double, parameters.grad.device()));
        for (start, length) in chunks(parameters) {
            let norm = parameters.grad.narrow(0, start, length).norm().to_kind(Kind::Double);
            let _ = squares.g_add_(&norm.square());
        }
        let norm = squares.sqrt().double_value(&[]);
        if largest > 0.0 && norm.is_finite() {
            let scale = largest / (norm + 1e-6);
            if scale < 1.0 {
                let _ = parameters.grad.g_mul_scalar_(scale);
            }
        }
        norm
    })
}
