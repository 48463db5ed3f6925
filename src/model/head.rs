//! The output head and the loss in one: linear layer, softmax, cross-entropy, and their gradients.
//!
//! N rows of C channels against V words. The (N, V) logits, the largest tensor of a small model by far, never exist
//! whole: a chunk of rows at a time becomes logits, loss, and gradients, and its memory serves the next chunk
//! (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024).

use tch::{no_grad, Kind, Tensor};

/// Logits of one chunk: enough rows for fast products, few enough to stay near the caches.
const CHUNK_ELEMENTS: i64 = 1 << 23;

/// The sum over rows of weight times negative log-likelihood.
///
/// `hidden` (..., C), `head` (V, C), `targets` (...) int64, `weights` (...) fp32.
pub fn loss(hidden: &Tensor, head: &Tensor, targets: &Tensor, weights: &Tensor) -> f64 {
    no_grad(|| {
        let rows = Rows::new(hidden, targets, weights);
        let mut total = 0.0;
        for (start, length) in rows.chunks(head) {
            let (hidden, targets, weights) = rows.chunk(start, length);
            let logits = hidden.mm(&head.tr()).to_kind(Kind::Float); // (n, V)
            let picked = logits.gather(1, &targets, false).squeeze_dim(1);
            let nll = logits.logsumexp([1i64].as_slice(), false) - picked; // (n,)
            total += (nll * weights.squeeze_dim(1)).sum(Kind::Double).double_value(&[]);
        }
        total
    })
}

/// [`loss`], and its gradients: the hidden states' is returned (shape and type of `hidden`), the head's is added to
/// `head_grad` (V, C) fp32.
pub fn loss_and_gradients(
    hidden: &Tensor,
    head: &Tensor,
    targets: &Tensor,
    weights: &Tensor,
    head_grad: &mut Tensor,
) -> (f64, Tensor) {
    no_grad(|| {
        let rows = Rows::new(hidden, targets, weights);
        let mut total = Tensor::zeros([1], (Kind::Double, hidden.device()));
        let mut grads = Vec::new();
        for (start, length) in rows.chunks(head) {
            let (hidden, targets, weights) = rows.chunk(start, length);
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
        (total.double_value(&[0]), rows.scatter(&grads, hidden))
    })
}

/// The rows that count: padding (weight 0) costs nothing in the head.
struct Rows {
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    /// The counted rows' numbers; `None` where every row counts.
    counted: Option<Tensor>,
}

impl Rows {
    fn new(hidden: &Tensor, targets: &Tensor, weights: &Tensor) -> Self {
        let width = hidden.size().last().copied().unwrap_or(1);
        let hidden = hidden.reshape([-1, width]);
        let (targets, weights) = (targets.reshape([-1, 1]), weights.reshape([-1, 1]));
        let counted = weights.reshape([-1]).nonzero().reshape([-1]);
        if counted.size() == [hidden.size()[0]] {
            return Self { hidden, targets, weights, counted: None };
        }
        Self {
            hidden: hidden.index_select(0, &counted),
            targets: targets.index_select(0, &counted),
            weights: weights.index_select(0, &counted),
            counted: Some(counted),
        }
    }

    /// (first row, rows) of each chunk.
    fn chunks(&self, head: &Tensor) -> impl Iterator<Item = (i64, i64)> {
        let rows = self.hidden.size()[0];
        let length = (CHUNK_ELEMENTS / head.size()[0]).clamp(16, 4096);
        (0..rows).step_by(length as usize).map(move |start| (start, length.min(rows - start)))
    }

    /// (n, C), (n, 1), (n, 1)
    fn chunk(&self, start: i64, length: i64) -> (Tensor, Tensor, Tensor) {
        let part = |tensor: &Tensor| tensor.narrow(0, start, length);
        (part(&self.hidden), part(&self.targets), part(&self.weights))
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
