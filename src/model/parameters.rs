//! Flat memory: every parameter is a view into one contiguous tensor, every gradient into another.
//!
//! All-reduce, clipping, AdamW and checkpoints are then operations on slices of a few tensors, whatever the model.
//! The buffer is laid out in the order in which the backward pass finishes the gradients: head first, embedding last.

use tch::{no_grad, Device, Kind, Tensor};

/// One parameter's place in the flat tensors.
#[derive(Debug, Clone)]
pub struct Spec {
    /// GPT-2's name for it in Hugging Face's checkpoints.
    pub name: String,
    /// Linear weights are (out, in).
    pub shape: Vec<i64>,
    /// Its first element in the flat tensors.
    pub offset: i64,
    /// Whether weight decay applies: matrices of linear layers.
    pub decay: bool,
}

impl Spec {
    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// This parameter's view of a flat tensor (P,).
    pub fn view(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.numel()).view(&self.shape[..])
    }
}

/// A head's rows on a GPU are read in multiples of so many.
pub const HEAD_ROWS: i64 = 64;

/// All parameters and gradients of a model, P elements each.
pub struct Parameters {
    /// Where each parameter is, in the order of the buffer.
    pub specs: Vec<Spec>,
    /// (P,) fp32: the weights that the optimizer changes.
    pub flat: Tensor,
    /// (P,) fp32: the gradients, summed over micro-steps and ranks.
    pub grad: Tensor,
    /// (P,) the weights that the model computes with: `flat` itself, or its bf16 copy. Zeros follow that copy, which are never
    /// trained: a head can be read as if it had a multiple of [`HEAD_ROWS`] rows, whether it is the last parameter or not.
    compute: Tensor,
    /// (P,) what autograd adds into: `grad` itself, or one micro-step's bf16 gradients (autograd refuses an fp32
    /// gradient on a bf16 leaf).
    compute_grad: Tensor,
    /// Whether whoever changed `flat` last has also made the bf16 copy of what they changed.
    pub copy_is_made: bool,
    leaves: Vec<Tensor>,
}

impl Parameters {
    /// Allocates zeros for parameters of these names, shapes and decays, in this order.
    pub fn new(shapes: Vec<(String, Vec<i64>, bool)>, device: Device, kind: Kind) -> Self {
        let mut offset = 0;
        let mut specs = Vec::with_capacity(shapes.len());
        for (name, shape, decay) in shapes {
            let spec = Spec { name, shape, offset, decay };
            offset += spec.numel();
            specs.push(spec);
        }
        let zeros = |length, kind| Tensor::zeros([length], (kind, device));
        let (flat, grad) = (zeros(offset, Kind::Float), zeros(offset, Kind::Float));
        let (compute, compute_grad) = if kind == Kind::Float {
            (flat.shallow_clone(), grad.shallow_clone())
        } else {
            let width: i64 = specs.last().map_or(0, |last| last.shape[1..].iter().product());
            (zeros(offset + (HEAD_ROWS - 1) * width, kind).narrow(0, 0, offset), zeros(offset, kind))
        };
        let leaves = specs.iter().map(|spec| leaf(spec, &compute, &compute_grad)).collect();
        Self { specs, flat, grad, compute, compute_grad, copy_is_made: false, leaves }
    }

    /// P: the number of parameters.
    pub fn numel(&self) -> i64 {
        self.flat.size()[0]
    }

    /// The weight of this name as the model computes with it; its gradient goes into the flat gradient.
    pub fn leaf(&self, name: &str) -> Option<Tensor> {
        let place = self.specs.iter().position(|spec| spec.name == name)?;
        Some(self.leaves[place].shallow_clone())
    }

    /// The fp32 gradient of the parameter of this name, a view.
    pub fn grad_of(&self, name: &str) -> Option<Tensor> {
        self.specs.iter().find(|spec| spec.name == name).map(|spec| spec.view(&self.grad))
    }

    /// Forgets the gradients, before a step's first micro-step.
    pub fn zero_grad(&mut self) {
        no_grad(|| {
            let _ = self.grad.zero_();
            if self.is_mixed() {
                let _ = self.compute_grad.zero_();
            }
        });
    }

    /// Adds a micro-step's bf16 gradients of the elements `from..to` into the fp32 sum.
    pub fn collect_gradients(&mut self, from: i64, to: i64) {
        if self.is_mixed() {
            no_grad(|| {
                let mut micro_step = self.compute_grad.narrow(0, from, to - from);
                let _ = self.grad.narrow(0, from, to - from).g_add_(&micro_step);
                let _ = micro_step.zero_();
            });
        }
    }

    /// Where the parameters whose names begin so end in the flat tensors; 0 if there are none.
    pub fn end_of(&self, prefix: &str) -> i64 {
        let named = self.specs.iter().filter(|spec| spec.name.starts_with(prefix));
        named.map(|spec| spec.offset + spec.numel()).max().unwrap_or(0)
    }

    /// Makes changed weights those that the model computes with; call after every change of `flat`.
    pub fn publish(&mut self) {
        if self.is_mixed() && !std::mem::take(&mut self.copy_is_made) {
            no_grad(|| self.compute.copy_(&self.flat));
        }
    }

    /// (P,) the weights that the model computes with.
    pub fn compute(&self) -> &Tensor {
        &self.compute
    }

    /// (P,) the bf16 copy of the weights, if the model computes with one.
    pub fn copy(&self) -> Option<Tensor> {
        self.is_mixed().then(|| self.compute.shallow_clone())
    }

    fn is_mixed(&self) -> bool {
        self.compute.kind() != self.flat.kind()
    }
}

/// A leaf of autograd that shares both its weight's and its gradient's storage with the flat tensors.
fn leaf(spec: &Spec, compute: &Tensor, compute_grad: &Tensor) -> Tensor {
    let leaf = spec.view(compute).detach().set_requires_grad(true);
    // A first backward pass makes the gradient exist; from then on autograd adds in place, into the view.
    (&leaf * 0.0).sum(leaf.kind()).backward();
    leaf.grad().set_data(&spec.view(compute_grad));
    leaf
}
