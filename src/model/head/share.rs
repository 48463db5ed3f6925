//! The rows that one core computes alone, against a small head: a chunk of rows at a time, and of its logits a piece of
//! words at a time, which stays in the core's cache from the product to its powers, and from the gradient to the products
//! with that. Each piece has a largest logit of its own, and the row's is made of those (Milakov and Gimelshein 2018, "Online
//! normalizer calculation for softmax").

use std::ops::Range;

use tch::{no_grad, Device, Kind, Tensor};

use super::{exp_of_negative, score, softmax, Score, WORDS};
use crate::torch;

/// The rows that one core computes.
pub(super) struct Share {
    /// (n, C)
    pub(super) hidden: Tensor,
    /// (V, C)
    pub(super) head: Tensor,
    pub(super) targets: Vec<i64>,
    pub(super) weights: Vec<f32>,
    pub(super) wants_grad: bool,
}

/// What became of a share; the gradients are undefined tensors if they were not wanted.
pub(super) struct Done {
    pub(super) scores: Vec<Score>,
    pub(super) grad: Tensor,
    pub(super) head_grad: Tensor,
}

/// The largest of some logits, and the sum of their powers relative to it.
type Sums = (f32, f32);

impl Share {
    /// Elements of logits at a time: the fewer, the more often the head and its gradient are read.
    const CHUNK_ELEMENTS: i64 = 1 << 22;

    /// Rows of a chunk against so many words.
    pub(super) fn chunk(words: i64) -> i64 {
        (Self::CHUNK_ELEMENTS / words).clamp(16, 1024)
    }

    pub(super) fn compute(self) -> Done {
        let length = Self::chunk(self.head.size()[0]);
        self.compute_at_a_time(length)
    }

    /// Chunks of `length` rows.
    pub(super) fn compute_at_a_time(self, length: i64) -> Done {
        no_grad(|| {
            let (n, c) = (self.hidden.size()[0], self.hidden.size()[1]);
            let (v, length) = (self.head.size()[0], length.min(n));
            let options = (Kind::Float, Device::Cpu);
            let logits = Tensor::empty([length * v], options);
            let (grad, head_grad) = match self.wants_grad {
                true => (Tensor::zeros([n, c], options), Tensor::zeros([v, c], options)),
                false => (Tensor::new(), Tensor::new()),
            };
            let mut scores = Vec::with_capacity(n as usize);
            for start in (0..n).step_by(length as usize) {
                let end = n.min(start + length);
                let chunk = Chunk {
                    hidden: self.hidden.narrow(0, start, end - start),
                    head: &self.head,
                    targets: &self.targets[start as usize..end as usize],
                    weights: &self.weights[start as usize..end as usize],
                    logits: &logits,
                };
                let (pieces, rows) = chunk.forward(&mut scores);
                if self.wants_grad {
                    chunk.backward(&pieces, &rows, &grad.narrow(0, start, end - start), &head_grad);
                }
            }
            Done { scores, grad, head_grad }
        })
    }
}

/// Some rows of a share, and memory for their logits: piece after piece, each (rows, words).
struct Chunk<'a> {
    hidden: Tensor,
    head: &'a Tensor,
    targets: &'a [i64],
    weights: &'a [f32],
    logits: &'a Tensor,
}

impl Chunk<'_> {
    /// Leaves each logit's power, relative to the largest of its row in its piece, and adds the rows' scores. Returns the
    /// sums of each piece's rows, and those of each row.
    fn forward(&self, scores: &mut Vec<Score>) -> (Vec<Vec<Sums>>, Vec<Sums>) {
        let mut picked = vec![0.0; self.targets.len()];
        let mut pieces = Vec::new();
        for words in self.pieces() {
            let mut logits = self.piece(&words);
            let _ = self.hidden.mm_out(&logits, &self.words(self.head, &words).tr());
            let sums =
                each_row(&mut logits, &words).zip(self.targets).zip(&mut picked).map(|((row, target), picked)| {
                    if words.contains(target) {
                        *picked = row[(target - words.start) as usize];
                    }
                    softmax::exponentials(row)
                });
            pieces.push(sums.collect::<Vec<Sums>>());
        }
        let whole = |row: usize| -> Sums {
            let parts = || pieces.iter().map(|sums| sums[row]);
            let largest = parts().fold(f32::NEG_INFINITY, |most, (part, _)| most.max(part));
            (largest, parts().map(|(part, sum)| sum * exp_of_negative(part - largest)).sum())
        };
        let rows: Vec<Sums> = (0..picked.len()).map(whole).collect();
        for ((&(largest, sum), picked), &weight) in rows.iter().zip(picked).zip(self.weights) {
            scores.push(score((sum.ln() - (picked - largest), picked == largest), weight));
        }
        (pieces, rows)
    }

    /// Makes gradients of the powers, weight * (softmax - one-hot), and adds their products to `grad` (rows, C) and
    /// `head_grad` (V, C).
    fn backward(&self, pieces: &[Vec<Sums>], rows: &[Sums], grad: &Tensor, head_grad: &Tensor) {
        for (words, sums) in self.pieces().zip(pieces) {
            let mut logits = self.piece(&words);
            let aims = self.targets.iter().zip(self.weights);
            for (row, ((target, weight), (part, whole))) in
                each_row(&mut logits, &words).zip(aims.zip(sums.iter().zip(rows)))
            {
                let scale = weight / whole.1 * exp_of_negative(part.0 - whole.0);
                row.iter_mut().for_each(|x| *x *= scale);
                if words.contains(target) {
                    row[(target - words.start) as usize] -= weight;
                }
            }
            let _ = self.words(head_grad, &words).addmm_(&logits.tr(), &self.hidden);
            let _ = grad.shallow_clone().addmm_(&logits, &self.words(self.head, &words));
        }
    }

    fn pieces(&self) -> impl Iterator<Item = Range<i64>> {
        let v = self.head.size()[0];
        (0..v).step_by(WORDS as usize).map(move |first| first..v.min(first + WORDS))
    }

    /// The logits (rows, words) of some words.
    fn piece(&self, words: &Range<i64>) -> Tensor {
        let (rows, length) = (self.targets.len() as i64, words.end - words.start);
        self.logits.narrow(0, rows * words.start, rows * length).view([rows, length])
    }

    /// The rows of a (V, C) tensor that belong to some words.
    fn words(&self, all: &Tensor, words: &Range<i64>) -> Tensor {
        all.narrow(0, words.start, words.end - words.start)
    }
}

/// The rows of a piece of logits.
fn each_row<'a>(logits: &'a mut Tensor, words: &Range<i64>) -> impl Iterator<Item = &'a mut [f32]> {
    torch::floats_mut(logits).chunks_exact_mut((words.end - words.start) as usize)
}
