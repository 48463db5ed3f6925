//! A block's forward and backward pass on a GPU in bf16, written out: autograd has the attention, and nothing else.
//!
//! Residual sums, dropout and layer norms are kernels of our own, two passes over memory where LibTorch makes five. The
//! gradients of the weights are added into fp32 by the products that make them: no bf16 gradients, which would have to be
//! collected.
//!
//! N = B T rows of C channels.

use tch::{no_grad, with_grad, Kind, Tensor};

use super::gpt::{Affine, Block};
use crate::config::{Activation, Norm, Shape};
use crate::random::mix;
use crate::torch::{self, Dropout, Kernels, Normed};

impl Shape {
    /// Whether blocks of such a model are computed so on a GPU, if it has our kernels.
    pub fn fits_kernels(&self, kind: Kind) -> bool {
        kind == Kind::BFloat16 && self.norm == Norm::Pre && self.n_embd % 8 == 0 && self.n_embd <= torch::MOST_CHANNELS
    }
}

/// What a block computes with, besides its weights.
pub struct Written<'a> {
    pub kernels: &'a Kernels,
    pub activation: Activation,
    pub dropout: f64,
    /// Fixes the draws of this block.
    pub seed: u64,
}

/// What the backward pass needs of the forward pass.
pub struct Kept {
    /// (N, C) each: the block's input, and the sum after the attention.
    x: Tensor,
    middle: Tensor,
    /// (N, C) each: the two norms' results, and (N, 2) fp32 their means and deviations.
    normed: [Tensor; 2],
    stats: [Tensor; 2],
    /// (N, 3C), and (N, C) what attention makes of it, with autograd's graph between them.
    qkv: Tensor,
    attended: Tensor,
    /// (N, 4C) each: before and after the nonlinearity.
    before: Tensor,
    after: Tensor,
}

impl Written<'_> {
    /// (B, T, C) to (B, T, C); `attend` is attention between its projections, (B, T, 3C) to (B, T, C).
    pub fn forward(&self, block: &Block, x: &Tensor, attend: impl FnOnce(&Tensor) -> Tensor) -> (Tensor, Kept) {
        let [b, t, c] = [0, 1, 2].map(|d| x.size()[d]);
        no_grad(|| {
            let x = x.detach().view([b * t, c]);
            let (_, normed_1, stats_1) = self.kernels.add_norm(&x, None, None, Some(block.ln_1.both()));
            let qkv = block.c_attn.linear(&normed_1).set_requires_grad(true);
            if self.dropout > 0.0 {
                tch::manual_seed(self.seed as i64); // attention's draws
            }
            let attended = with_grad(|| attend(&qkv.view([b, t, 3 * c])).view([b * t, c]));
            let branch = block.attn_proj.linear(&attended.detach());
            let (middle, normed_2, stats_2) =
                self.kernels.add_norm(&x, Some(&branch), self.draws(0), Some(block.ln_2.both()));
            let before = block.c_fc.linear(&normed_2);
            let after = match self.activation {
                Activation::Gelu => before.gelu("tanh"),
                Activation::Relu => before.relu(),
            };
            let branch = block.mlp_proj.linear(&after);
            let (output, ..) = self.kernels.add_norm(&middle, Some(&branch), self.draws(1), None);
            let (normed, stats) = ([normed_1, normed_2], [stats_1, stats_2]);
            (output.view([b, t, c]), Kept { x, middle, normed, stats, qkv, attended, before, after })
        })
    }

    /// The gradient of the block's output (B, T, C) to its input's; those of the weights are added to theirs.
    pub fn backward(&self, block: &Block, kept: Kept, grad: &Tensor) -> Tensor {
        let output = grad;
        no_grad(|| {
            let grad = output.reshape([-1, block.ln_1.weight.size()[0]]);
            let Kept {
                x,
                middle,
                normed: [normed_1, normed_2],
                stats: [stats_1, stats_2],
                qkv,
                attended,
                before,
                after,
            } = kept;
            let branch = match self.draws(1) {
                None => grad.shallow_clone(),
                draws => self.kernels.add_norm_backward(&grad, None, draws).1,
            };
            let dafter = block.mlp_proj.backward(&after, &branch);
            let dbefore = match self.activation {
                Activation::Gelu => before.gelu_backward(&dafter, "tanh"),
                Activation::Relu => after.threshold_backward(&dafter, 0),
            };
            let dnormed = block.c_fc.backward(&normed_2, &dbefore);
            let norm = Normed { grad: &dnormed, sum: &middle, stats: &stats_2, weight: &block.ln_2.weight };
            let (dmiddle, branch, parts) = self.kernels.add_norm_backward(&grad, Some(norm), self.draws(0));
            block.ln_2.add_gradients(&parts);
            torch::backward(&attended, &block.attn_proj.backward(&attended.detach(), &branch));
            let dnormed = block.c_attn.backward(&normed_1, &qkv.grad());
            let norm = Normed { grad: &dnormed, sum: &x, stats: &stats_1, weight: &block.ln_1.weight };
            let (dx, _, parts) = self.kernels.add_norm_backward(&dmiddle, Some(norm), None);
            block.ln_1.add_gradients(&parts);
            dx.view_as(output)
        })
    }

    /// The dropout of one of the block's two branches.
    fn draws(&self, branch: u64) -> Option<Dropout> {
        (self.dropout > 0.0).then(|| Dropout { probability: self.dropout, key: mix(self.seed, 1 + branch) })
    }
}

impl Affine {
    fn both(&self) -> (&Tensor, Option<&Tensor>) {
        (&self.weight, self.bias.as_ref())
    }

    /// The gradient of a linear layer's output (N, out) to its input's, which was `x` (N, in); those of weight and bias are
    /// added to theirs.
    fn backward(&self, x: &Tensor, grad: &Tensor) -> Tensor {
        let _ = self.weight_grad.addmm_dtype_out(&self.weight_grad, &grad.tr(), x, Kind::Float);
        if let Some(bias) = &self.bias_grad {
            let _ = bias.shallow_clone().g_add_(&grad.sum_dim_intlist(0, false, Kind::Float));
        }
        grad.mm(&self.weight)
    }

    /// Adds a norm's gradients, which come in parts (parts, 2, C).
    fn add_gradients(&self, parts: &Tensor) {
        let sums = parts.sum_dim_intlist(0, false, Kind::Float); // (2, C)
        let _ = self.weight_grad.shallow_clone().g_add_(&sums.get(0));
        if let Some(bias) = &self.bias_grad {
            let _ = bias.shallow_clone().g_add_(&sums.get(1));
        }
    }
}
