//! AdamW on flat memory (Loshchilov and Hutter 2019).

use tch::{no_grad, Kind, Tensor};

use crate::config::Optim;
use crate::model::Parameters;

/// Elements updated at a time, so that the temporaries of an update stay in the caches.
const CHUNK: i64 = 1 << 18;

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
            // A GPU has no caches to stay in, and pays for every launch.
            let chunk = if parameters.flat.device().is_cuda() { parameters.numel() } else { CHUNK };
            for start in (0..parameters.numel()).step_by(chunk as usize) {
                let part = |flat: &Tensor| flat.narrow(0, start, chunk.min(flat.size()[0] - start));
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
/// A norm that is not finite leaves the gradient alone.
pub fn clip(parameters: &mut Parameters, largest: f64) -> f64 {
    no_grad(|| {
        let norm = parameters.grad.norm().to_kind(Kind::Double).double_value(&[]);
        if largest > 0.0 && norm.is_finite() {
            let scale = largest / (norm + 1e-6);
            if scale < 1.0 {
                let _ = parameters.grad.g_mul_scalar_(scale);
            }
        }
        norm
    })
}
