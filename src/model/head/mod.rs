//! The output head and the loss in one: linear layer, softmax, cross-entropy, and their gradients.
//!
//! N rows of C channels against V words. The (N, V) logits, the largest tensor of a small model by far, never exist
//! whole: a chunk of rows at a time becomes logits, loss, and gradients, and its memory serves the next chunk
//! (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024).
//!
//! On the CPU, against a small head in fp32, every core takes a share of the rows, a piece of the words at a time, which
//! stays in its cache between two products; else all cores make a product together, and share out the rows of logits
//! between products. On a GPU in bf16 a kernel of our own turns logits into loss and gradient in place; elsewhere LibTorch's
//! own kernels do.

mod share;
mod softmax;

pub(super) use self::softmax::exp_of_negative;

use rayon::prelude::*;
use tch::{no_grad, Device, Kind, Tensor};

use self::share::{Done, Share};
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
        if rows.is_empty() {
            return Vec::new();
        }
        match head.device() {
            Device::Cpu if is_shared(head.numel() as i64, head.kind()) => {
                let done: Vec<Done> = rows.share(head, false).into_par_iter().map(Share::compute).collect();
                return done.into_iter().flat_map(|share| share.scores).collect();
            }
            Device::Cpu => return by_turns(&rows, head, None, turn_elements(head.numel() as i64, head.kind())).0,
            _ => (),
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
        let numbers: Vec<f64> = values(&Tensor::cat(&chunks, 0));
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
        let sum = |scores: &[Score]| scores.iter().map(|score| score.loss).sum::<f64>();
        let (loss, grads) = match head.device() {
            _ if rows.is_empty() => (Tensor::zeros([1], (Kind::Double, head.device())), Vec::new()),
            Device::Cpu if is_shared(head.numel() as i64, head.kind()) => {
                // In the order of the shares, so that the sums do not depend on who is done first.
                let done: Vec<Done> = rows.share(head, true).into_par_iter().map(Share::compute).collect();
                for share in &done {
                    let _ = head_grad.g_add_(&share.head_grad);
                }
                let loss: f64 = done.iter().map(|share| sum(&share.scores)).sum();
                (Tensor::from_slice(&[loss]), done.into_iter().map(|share| share.grad).collect())
            }
            Device::Cpu => {
                let (scores, grads) =
                    by_turns(&rows, head, Some(head_grad), turn_elements(head.numel() as i64, head.kind()));
                (Tensor::from_slice(&[sum(&scores)]), grads)
            }
            _ => match own_kernels(head) {
                Some(kernels) => by_own_kernel(&rows, head, head_grad, kernels),
                None => on_device(&rows, head, head_grad),
            },
        };
        (loss, rows.scatter(&grads, hidden))
    })
}

/// The bytes that [`loss_and_gradients`] works with for N rows of C channels against V words, besides the gradient of the
/// hidden states. `kind` is the type of the head, `threads` compute on a CPU.
pub fn working_bytes(rows: i64, width: i64, words: i64, threads: i64, kind: Kind, device: Device) -> i64 {
    let bytes = if kind == Kind::Float { 4 } else { 2 };
    if device == Device::Cpu {
        if is_shared(words * width, kind) {
            let shares = shares(rows, words * width, threads);
            return 4 * shares * words * (Share::chunk(words).min(rows) + width);
        }
        // In bf16 also a chunk's gradient of the head, before it is added.
        let product = if kind == Kind::Float { 0 } else { words * width };
        return bytes * (turn(rows, words, turn_elements(words * width, kind)) * words + product);
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

/// Whether each core of a CPU takes a share of the rows against a head of so many elements, with a gradient of all of them.
pub fn is_shared(head: i64, kind: Kind) -> bool {
    const MOST: i64 = 1 << 22;
    kind == Kind::Float && head <= MOST
}

/// Elements of logits that all cores of a CPU work on together: the more, the faster are the products, but they take no more
/// memory than a head in fp32, unless that is small.
fn turn_elements(head: i64, kind: Kind) -> i64 {
    head.max(1 << 24) * if kind == Kind::Float { 1 } else { 2 }
}

/// How many of these rows make a chunk of at most so many elements, if all chunks are nearly alike.
fn turn(rows: i64, words: i64, elements: i64) -> i64 {
    let most = Rows::chunk(words, elements);
    let chunks = (rows + most - 1) / most;
    (rows + chunks - 1) / chunks
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

/// MKL takes 1.4 times as long for a product with all words as for products with so many of them.
const WORDS: i64 = 1 << 10;

/// Each row's score, and each chunk's gradient (n, C) if the head's is given, to be added to: products by all cores, and
/// between them the rows of logits shared out to them. A chunk has so many `elements` of logits.
fn by_turns(
    rows: &Rows,
    head: &Tensor,
    mut head_grad: Option<&mut Tensor>,
    elements: i64,
) -> (Vec<Score>, Vec<Tensor>) {
    let (n, v) = (rows.hidden.size()[0], head.size()[0]);
    let at_a_time = if head.kind() == Kind::Float { WORDS } else { v };
    let length = turn(n, v, elements);
    let logits = Tensor::empty([length, v], (head.kind(), Device::Cpu));
    let (mut scores, mut grads) = (Vec::with_capacity(n as usize), Vec::new());
    for (hidden, targets, weights) in rows.chunks(v, length * v) {
        let mut logits = logits.narrow(0, 0, hidden.size()[0]); // (n, V)
        for first in (0..v).step_by(at_a_time as usize) {
            let words = at_a_time.min(v - first);
            let _ = hidden.mm_out(&logits.narrow(1, first, words), &head.narrow(0, first, words).tr());
        }
        let (targets, weights): (Vec<i64>, Vec<f32>) = (values(&targets), values(&weights));
        let aims = targets.into_par_iter().zip(weights);
        let wants_grad = head_grad.is_some();
        let words = v as usize;
        if head.kind() == Kind::Float {
            let rows = torch::floats_mut(&mut logits).par_chunks_mut(words).zip(aims);
            scores.par_extend(rows.map(|(row, (target, weight))| {
                score(softmax::cross_entropy(row, target as usize, wants_grad.then_some(weight)), weight)
            }));
        } else {
            let rows = torch::halves_mut(&mut logits).par_chunks_mut(words).zip(aims);
            scores.par_extend(rows.map(|(row, (target, weight))| {
                score(softmax::cross_entropy_bf16(row, target as usize, wants_grad.then_some(weight)), weight)
            }));
        }
        if let Some(head_grad) = &mut head_grad {
            let by_word = logits.tr(); // (V, n)
            let _ = match head.kind() {
                Kind::Float => head_grad.addmm_(&by_word, &hidden),
                _ => head_grad.g_add_(&by_word.mm(&hidden)),
            };
            grads.push(logits.mm(head)); // (n, C)
        }
    }
    (scores, grads)
}

/// The loss and each chunk's gradient (n, C), by LibTorch's kernels.
fn on_device(rows: &Rows, head: &Tensor, head_grad: &mut Tensor) -> (Tensor, Vec<Tensor>) {
    let mut total = Tensor::zeros([1], (Kind::Double, head.device())); // losses are added up in fp64
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

fn score((nll, is_likeliest): (f32, bool), weight: f32) -> Score {
    Score { loss: f64::from(nll) * f64::from(weight), is_likeliest }
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

    fn is_empty(&self) -> bool {
        self.hidden.size()[0] == 0
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Each way on the CPU beside fp64: several chunks of rows, and of words.
    #[test]
    fn every_way_on_the_cpu_is_that_of_double_precision() {
        let (n, c, v) = (50, 24, 2500);
        let options = (Kind::Float, Device::Cpu);
        // LibTorch's generator is one for all tests, which run side by side.
        let numbers = |shape: [i64; 2], factor: f64| {
            let numbers = Tensor::arange(shape[0] * shape[1], options);
            ((numbers * factor).sin() * 2.0).view(shape)
        };
        let (targets, weights) = ((Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 49), numbers([n, 1], 0.3).abs());
        for (kind, bound) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            let (hidden, head) = (numbers([n, c], 1.7).to_kind(kind), numbers([v, c], 1.3).to_kind(kind));
            let exact = |x: &Tensor| x.to_kind(Kind::Double).detach().set_requires_grad(true);
            let (x, w) = (exact(&hidden), exact(&head));
            let logits = x.mm(&w.tr());
            let nll = -logits.log_softmax(1, Kind::Double).gather(1, &targets.view([-1, 1]), false);
            let losses = nll * &weights;
            losses.sum(Kind::Double).backward();

            let rows = Rows::new(&hidden, &Targets { ids: &targets, weights: &weights, counted: None });
            let before = numbers([v, c], 0.9);
            let mut by_turns_grad = before.copy();
            let (scores, grads) = by_turns(&rows, &head, Some(&mut by_turns_grad), 20 * v);
            assert_eq!(grads.len(), 3);
            let mut found = vec![(scores, Tensor::cat(&grads, 0), by_turns_grad - &before)];
            if kind == Kind::Float {
                let done: Vec<Done> =
                    rows.share(&head, true).into_iter().map(|share| share.compute_at_a_time(20)).collect();
                let head_grads: Vec<&Tensor> = done.iter().map(|share| &share.head_grad).collect();
                let grads: Vec<&Tensor> = done.iter().map(|share| &share.grad).collect();
                let (grad, head_grad) =
                    (Tensor::cat(&grads, 0), Tensor::stack(&head_grads, 0).sum_dim_intlist(0, false, kind));
                found.push((done.into_iter().flat_map(|share| share.scores).collect(), grad, head_grad));
            }
            for (scores, grad, head_grad) in found {
                let losses_found: Vec<f64> = scores.iter().map(|score| score.loss).collect();
                let pairs = [
                    (&Tensor::from_slice(&losses_found).view([-1, 1]), &losses),
                    (&grad, &x.grad()),
                    (&head_grad, &w.grad()),
                ];
                for (found, expected) in pairs {
                    let distance = ((found - expected).norm() / expected.norm()).double_value(&[]);
                    assert!(distance < bound, "{kind:?}: {distance:e}");
                }
                let largest = logits.amax([1i64].as_slice(), false);
                let likeliest = logits.gather(1, &targets.view([-1, 1]), false).view([-1]).eq_tensor(&largest);
                let found: Vec<bool> = scores.iter().map(|score| score.is_likeliest).collect();
                assert!(kind != Kind::Float || found == Vec::<bool>::try_from(&likeliest).unwrap());
                // Without gradients the same.
                let again = by_turns(&rows, &head, None, 20 * v).0;
                let losses: Vec<f64> = again.iter().map(|score| score.loss).collect();
                assert!(losses.iter().zip(&losses_found).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)));
            }
        }
    }
}
