//! The output head and the loss in one: linear layer, softmax, cross-entropy, and their gradients.
//!
//! N rows of C channels against V words. The (N, V) logits, the largest tensor of a small model by far, never exist
//! whole: a chunk of rows at a time becomes logits, loss, and gradients, and its memory serves the next chunk
//! (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024).
//!
//! On the CPU in fp32 every core takes a share of the rows, and its chunk stays in its cache from the product to the
//! gradients. On a GPU in bf16 a kernel of our own turns logits into loss and gradient in place; elsewhere LibTorch's own
//! kernels do the work.
mod softmax;

pub(super) use self::softmax::exp_of_negative;

use rayon::prelude::*;
use tch::{no_grad, Device, Kind, Tensor};

use super::parameters::HEAD_ROWS;
use crate::torch::{self, Kernels};

/// What the hidden states are to predict.
pub struct Targets<'a> {
    /// (...) int64
    pub ids: &'a Tensor,
    /// (...) fp32
    pub weights: &'a Tensor,
    /// (N,) int64: the flattened rows whose weight is not 0; `None` for all.
    pub counted: Option<&'a Tensor>,
}

/// How well a row's target is predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Weight times negative log-likelihood.
    pub loss: f64,
    /// Whether no other token is likelier.
    pub is_likeliest: bool,
}

/// The scores of the rows that count, in their order. `hidden` (..., C), `head` (V, C).
pub fn scores(hidden: &Tensor, head: &Tensor, targets: &Targets) -> Vec<Score> {
    no_grad(|| {
        let rows = Rows::new(hidden, targets);
        if runs_on_cores(&rows, head) {
            let done: Vec<Done> = rows.share(head, false).into_par_iter().map(Share::compute).collect();
            return done.into_iter().flat_map(|share| share.scores).collect();
        }
        let score = |(hidden, targets, weights): (Tensor, Tensor, Tensor)| {
            let logits = hidden.mm(&head.tr()).to_kind(Kind::Float); // (n, V)
            let picked = logits.gather(1, &targets, false); // (n, 1)
            let nll = logits.logsumexp([1i64].as_slice(), true) - &picked; // (n, 1)
            let is_likeliest = picked.eq_tensor(&logits.amax([1i64].as_slice(), true)); // (n, 1)
            Tensor::cat(&[(nll.to_kind(Kind::Double) * weights), is_likeliest.to_kind(Kind::Double)], 1)
            // (n, 2)
        };
        let chunks: Vec<Tensor> = rows.chunks(head.size()[0], Rows::CHUNK_ELEMENTS).map(score).collect();
        // One copy for all chunks: each would wait for the device.
        let numbers: Vec<f64> = if chunks.is_empty() { Vec::new() } else { values(&Tensor::cat(&chunks, 0)) };
        numbers.chunks_exact(2).map(|row| Score { loss: row[0], is_likeliest: row[1] > 0.0 }).collect()
    })
}

/// The sum over rows of weight times negative log-likelihood, (1,) fp64, and its gradients: the hidden states' is returned
/// (shape and type of `hidden`), the head's is added to `head_grad` (V, C) fp32.
///
/// The loss is a tensor because a number would have to wait for a GPU, which the backward pass need not.
pub fn loss_and_gradients(
    hidden: &Tensor,
    head: &Tensor,
    targets: &Targets,
    head_grad: &mut Tensor,
) -> (Tensor, Tensor) {
    no_grad(|| {
        let rows = Rows::new(hidden, targets);
        let (loss, grads) = if runs_on_cores(&rows, head) {
            // In the order of the shares, so that the sums do not depend on who is done first.
            let done: Vec<Done> = rows.share(head, true).into_par_iter().map(Share::compute).collect();
            for share in &done {
                let _ = head_grad.g_add_(&share.head_grad);
            }
            let share_loss = |share: &Done| share.scores.iter().map(|score| score.loss).sum::<f64>();
            let loss: f64 = done.iter().map(share_loss).sum();
            (Tensor::from_slice(&[loss]), done.into_iter().map(|share| share.grad).collect())
        } else if let Some(kernels) = own_kernels(head) {
            by_own_kernel(&rows, head, head_grad, kernels)
        } else {
            on_device(&rows, head, head_grad)
        };
        (loss, rows.scatter(&grads, hidden))
    })
}

/// The bytes that [`loss_and_gradients`] works with for N rows of C channels against V words, besides the gradient of the
/// hidden states. `kind` is the type of the head, `threads` compute on a CPU.
pub fn working_bytes(rows: i64, width: i64, words: i64, threads: i64, kind: Kind, device: Device) -> i64 {
    if device == Device::Cpu && kind == Kind::Float {
        let shares = shares(rows, words * width, threads);
        return 4 * shares * words * (Share::chunk(words).min(rows) + width);
    }
    if device.is_cuda() && kind == Kind::BFloat16 {
        let words = padded(words);
        return 2 * Rows::chunk(words, Rows::OWN_CHUNK_ELEMENTS).min(rows) * words + 4 * rows;
    }
    // Logits in fp32; in bf16 also as they were made, or as a gradient, and the head's gradient before it is added.
    let logits = Rows::chunk(words, Rows::CHUNK_ELEMENTS).min(rows) * words;
    match kind {
        Kind::Float => 4 * logits,
        _ => (4 + 2) * logits + 2 * words * width,
    }
}

/// How many threads take a share of the rows, each with its own gradient of a head of so many elements.
fn shares(rows: i64, head: i64, threads: i64) -> i64 {
    threads.min(rows).min(Rows::HEAD_GRAD_ELEMENTS / head).max(1)
}

/// The kernels that compute with this head, if there are any.
fn own_kernels(head: &Tensor) -> Option<&'static Kernels> {
    (head.kind() == Kind::BFloat16).then(|| torch::kernels(head.device())).flatten()
}

/// The rows of a head of so many words on a GPU, whose tensor cores take matrices of whole multiples only at full speed.
fn padded(words: i64) -> i64 {
    (words + HEAD_ROWS - 1) / HEAD_ROWS * HEAD_ROWS
}

/// The loss and each chunk's gradient (n, C), by LibTorch's products and a kernel of our own between them.
fn by_own_kernel(rows: &Rows, head: &Tensor, head_grad: &Tensor, kernels: &Kernels) -> (Tensor, Vec<Tensor>) {
    let [words, width] = [0, 1].map(|d| head.size()[d]);
    // Below the head are zeros or other parameters, `Parameters` says; the kernel takes no notice of their logits.
    let head = head.detach().as_strided([padded(words), width], [width, 1], None::<i64>); // (P, C), P >= V
    let n = rows.hidden.size()[0];
    let losses = Tensor::empty([n], (Kind::Float, head.device()));
    let mut grads = Vec::new();
    let mut done = 0;
    for (hidden, targets, weights) in rows.chunks(padded(words), Rows::OWN_CHUNK_ELEMENTS) {
        let n = hidden.size()[0];
        let logits = hidden.mm(&head.tr()); // (n, P)
        kernels.cross_entropy(&logits, words, &targets, &weights, &losses.narrow(0, done, n));
        let dlogits = logits;
        // Into fp32, without a product in bf16 that would be added.
        let by_word = dlogits.narrow(1, 0, words).tr(); // (V, n)
        let _ = head_grad.addmm_dtype_out(head_grad, &by_word, &hidden, Kind::Float);
        grads.push(dlogits.mm(&head)); // (n, C)
        done += n;
    }
    (losses.sum(Kind::Double).view([1]), grads)
}

/// The loss and each chunk's gradient (n, C), by LibTorch's kernels.
fn on_device(rows: &Rows, head: &Tensor, head_grad: &mut Tensor) -> (Tensor, Vec<Tensor>) {
    let mut total = zero(head);
    let mut grads = Vec::new();
    for (hidden, targets, weights) in rows.chunks(head.size()[0], Rows::CHUNK_ELEMENTS) {
        let mut logits = hidden.mm(&head.tr()).to_kind(Kind::Float); // (n, V)
        let largest = logits.amax([1i64].as_slice(), true); // (n, 1)
        let _ = logits.g_sub_(&largest);
        let picked = logits.gather(1, &targets, false); // (n, 1)
        let _ = logits.exp_();
        let sum = logits.sum_dim_intlist([1i64].as_slice(), true, Kind::Float); // (n, 1)
        let _ = total.g_add_(&((sum.log() - picked) * &weights).sum(Kind::Double));
        // d loss / d logits = weight * (softmax - one-hot)
        let _ = logits.g_mul_(&(&weights / &sum));
        let _ = logits.scatter_add_(1, &targets, &weights.neg());
        let dlogits = logits.to_kind(hidden.kind());
        if head.kind() == Kind::Float {
            let _ = head_grad.addmm_(&dlogits.tr(), &hidden);
        } else {
            let _ = head_grad.g_add_(&dlogits.tr().mm(&hidden));
        }
        grads.push(dlogits.mm(head)); // (n, C)
    }
    (total, grads)
}

/// (1,) fp64, to add up losses.
fn zero(head: &Tensor) -> Tensor {
    Tensor::zeros([1], (Kind::Double, head.device()))
}

fn runs_on_cores(rows: &Rows, head: &Tensor) -> bool {
    head.device() == Device::Cpu && head.kind() == Kind::Float && rows.hidden.size()[0] > 0
}

/// The rows that one core computes.
struct Share {
    hidden: Tensor,
    head: Tensor,
    targets: Vec<i64>,
    weights: Vec<f32>,
    wants_grad: bool,
}

/// What became of a share; the gradients are undefined tensors if they were not wanted.
struct Done {
    scores: Vec<Score>,
    grad: Tensor,
    head_grad: Tensor,
}

impl Share {
    /// Elements of logits at a time: they, and the rows of the head that meet them, stay near the core.
    const CHUNK_ELEMENTS: i64 = 1 << 21;

    /// Rows of a chunk against so many words.
    fn chunk(words: i64) -> i64 {
        (Self::CHUNK_ELEMENTS / words).clamp(16, 1024)
    }

    fn compute(self) -> Done {
        no_grad(|| {
            let (n, c) = (self.hidden.size()[0], self.hidden.size()[1]);
            let v = self.head.size()[0];
            let length = Self::chunk(v);
            let options = (Kind::Float, Device::Cpu);
            let logits = Tensor::empty([length.min(n), v], options);
            let (grad, mut head_grad) = if self.wants_grad {
                (Tensor::empty([n, c], options), Tensor::zeros([v, c], options))
            } else {
                (Tensor::new(), Tensor::new())
            };
            let mut scores = Vec::with_capacity(n as usize);
            for start in (0..n).step_by(length as usize) {
                let rows = length.min(n - start);
                let hidden = self.hidden.narrow(0, start, rows);
                let mut logits = logits.narrow(0, 0, rows); // (rows, V)
                let _ = hidden.mm_out(&logits, &self.head.tr());
                let first = start as usize;
                for (row, logits) in torch::floats_mut(&mut logits).chunks_exact_mut(v as usize).enumerate() {
                    let (target, weight) = (self.targets[first + row] as usize, self.weights[first + row]);
                    let (nll, is_likeliest) = softmax::cross_entropy(logits, target, self.wants_grad.then_some(weight));
                    scores.push(Score { loss: f64::from(nll) * f64::from(weight), is_likeliest });
                }
                if self.wants_grad {
                    let _ = head_grad.addmm_(&logits.tr(), &hidden);
                    let _ = logits.mm_out(&grad.narrow(0, start, rows), &self.head);
                }
            }
            Done { scores, grad, head_grad }
        })
    }
}

/// The rows that count: padding (weight 0) costs nothing in the head.
struct Rows {
    /// (N, C)
    hidden: Tensor,
    /// (N, 1)
    targets: Tensor,
    /// (N, 1)
    weights: Tensor,
    /// The counted rows' numbers; `None` if every row counts.
    counted: Option<Tensor>,
}

impl Rows {
    /// Elements of the head's gradient that all shares may hold together: 1 GiB.
    const HEAD_GRAD_ELEMENTS: i64 = 1 << 28;
    /// Elements of logits that a chunk of LibTorch's kernels works on.
    const CHUNK_ELEMENTS: i64 = 1 << 26;
    /// The same for the kernel of our own, which has them once and in bf16: 512 MiB. The fewer chunks, the fewer times all of
    /// the head's gradient is read and written.
    const OWN_CHUNK_ELEMENTS: i64 = 1 << 28;

    /// Rows of a chunk of so many elements against so many words.
    fn chunk(words: i64, elements: i64) -> i64 {
        (elements / words).clamp(16, 8192)
    }

    fn new(hidden: &Tensor, targets: &Targets) -> Self {
        let width = hidden.size().last().copied().unwrap_or(1);
        let hidden = hidden.reshape([-1, width]);
        let (ids, weights) = (targets.ids.reshape([-1, 1]), targets.weights.reshape([-1, 1]));
        let Some(counted) = targets.counted else { return Self { hidden, targets: ids, weights, counted: None } };
        Self {
            hidden: hidden.index_select(0, counted),
            targets: ids.index_select(0, counted),
            weights: weights.index_select(0, counted),
            counted: Some(counted.shallow_clone()),
        }
    }

    /// Hidden states (n, C), targets (n, 1) and weights (n, 1) of each chunk.
    fn chunks(&self, words: i64, elements: i64) -> impl Iterator<Item = (Tensor, Tensor, Tensor)> + '_ {
        let rows = self.hidden.size()[0];
        let length = Self::chunk(words, elements);
        (0..rows).step_by(length as usize).map(move |start| {
            let part = |tensor: &Tensor| tensor.narrow(0, start, length.min(rows - start));
            (part(&self.hidden), part(&self.targets), part(&self.weights))
        })
    }

    /// The rows in as many contiguous shares as there are threads; fewer if each one's gradient of the head is large.
    fn share(&self, head: &Tensor, wants_grad: bool) -> Vec<Share> {
        let rows = self.hidden.size()[0];
        let mut threads = (rayon::current_num_threads() as i64).min(rows);
        if wants_grad {
            threads = shares(rows, head.numel() as i64, threads);
        }
        let targets: Vec<i64> = values(&self.targets);
        let weights: Vec<f32> = values(&self.weights);
        (0..threads)
            .map(|thread| {
                let (start, end) = (rows * thread / threads, rows * (thread + 1) / threads);
                Share {
                    hidden: self.hidden.narrow(0, start, end - start),
                    head: head.detach(),
                    targets: targets[start as usize..end as usize].to_vec(),
                    weights: weights[start as usize..end as usize].to_vec(),
                    wants_grad,
                }
            })
            .collect()
    }

    /// The chunks' gradients at their rows' places, zeros elsewhere.
    fn scatter(&self, grads: &[Tensor], hidden: &Tensor) -> Tensor {
        if grads.is_empty() {
            return hidden.zeros_like();
        }
        let grads = Tensor::cat(grads, 0);
        match &self.counted {
            None => grads.view_as(hidden),
            Some(counted) => {
                let all = Tensor::zeros_like(&hidden.reshape([-1, grads.size()[1]]));
                all.index_copy(0, counted, &grads).view_as(hidden)
            }
        }
    }
}

fn values<T: tch::kind::Element + Default + Clone>(tensor: &Tensor) -> Vec<T> {
    let mut values = vec![T::default(); tensor.numel()];
    tensor.copy_data(&mut values, tensor.numel());
    values
}
