//! How much memory a rank needs, counted from the shapes of what a step holds: `train --dry-run` prints it.
//!
//! B sequences of T tokens at a time, C channels, H heads, L blocks, P parameters.

use tch::{Device, Kind};

use crate::config::{Activation, Norm, Shape};
use crate::model::head;

/// What decides the size of a rank's memory, besides the model.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Sequences of a micro-batch.
    pub micro_batch: i64,
    /// The type of weights and activations.
    pub kind: Kind,
    pub device: Device,
    /// Whether gradients travel as a bf16 copy.
    pub has_wire: bool,
    /// Elements of each of the optimizer's moments on this rank.
    pub moments: i64,
    /// CPU threads that compute the head.
    pub threads: i64,
    /// Whether rows are padded: those that count are then copied for the head.
    pub is_padded: bool,
    /// Whether a checkpoint may be on its way to the disk while steps go on.
    pub saves_meanwhile: bool,
}

/// The most that a rank holds at a time, without the program itself: (what for, bytes), in the order in which it comes.
pub fn parts(shape: &Shape, setting: &Setting) -> Vec<(&'static str, i64)> {
    let parameters = shape.parameters();
    let narrow = if setting.kind == Kind::Float { 0 } else { 2 };
    let wire = if setting.has_wire { 2 } else { 0 };
    let moments = 8 * setting.moments;
    let (head, returned) = head(shape, setting);
    // The weights and moments as they were, and one of the moments once more as it is written.
    let (snapshot, copy) = if setting.device == Device::Cpu { (4 * parameters + moments, moments / 2) } else { (0, 0) };
    // The copy is made first, and the next step's head comes later; after the last step no head comes.
    let beside = match setting.saves_meanwhile {
        true => snapshot + (copy - returned).max(0),
        false => (snapshot + copy - returned).max(0),
    };
    vec![
        ("weights", parameters * (4 + narrow)),
        ("gradients", parameters * (4 + narrow + wire)),
        ("moments", moments),
        ("activations", kept(shape, setting)),
        ("head", head),
        ("backward pass", backward(shape, setting)),
        ("checkpoint on its way", beside),
    ]
}

/// Elements of a hidden state (B, T, C), and the bytes of each.
fn state(shape: &Shape, setting: &Setting) -> (i64, i64) {
    let bytes = if setting.kind == Kind::Float { 4 } else { 2 };
    (setting.micro_batch * shape.block_size * shape.n_embd, bytes)
}

/// What the forward pass keeps for the backward pass.
fn kept(shape: &Shape, setting: &Setting) -> i64 {
    let (state, bytes) = state(shape, setting);
    let block = block(shape, setting);
    let ends = match shape.norm {
        Norm::Pre => 2, // the embedding's output, and the last norm's
        Norm::Post => 1,
    } * state
        * bytes;
    match shape.recompute {
        // Each block's input, and one block at a time.
        true => ends + shape.n_layer * state * bytes + block,
        false => ends + shape.n_layer * block,
    }
}

/// What one block keeps, its output included.
fn block(shape: &Shape, setting: &Setting) -> i64 {
    let (state, bytes) = state(shape, setting);
    let rows = setting.micro_batch * shape.block_size;
    let heads = rows * shape.n_head;
    // The two norms', queries, keys and values, attention's output, the two sums.
    let mut states = 2 + 3 + 1 + 2;
    states += match shape.activation {
        Activation::Gelu => 2 * 4, // before and after
        Activation::Relu => 4,     // after
    };
    // Mean and deviation of each row, twice.
    let mut rest = 4 * 4 * rows;
    if shape.dropout > 0.0 && (setting.device == Device::Cpu || !shape.fits_kernels(setting.kind)) {
        // The masks of the two sublayers. Our own kernels keep none; a GPU that cannot have them keeps more than is
        // said here.
        states += 2;
    }
    if shape.dropout > 0.0 && setting.device == Device::Cpu {
        // No fused kernel drops out there: queries and keys are scaled, the output is copied, and of the scores (B, H, T, T)
        // the softmax, the mask, and what it leaves are kept.
        states += 3;
        rest += 3 * heads * shape.block_size * bytes;
    } else {
        rest += 4 * heads; // the fused kernel's normalisers
    }
    states * state * bytes + rest
}

/// The most that a block's backward pass works with, besides what is kept: the gradients before and after the nonlinearity and
/// those around them, which come to 8 states, and as much again, as measured, for the gaps between pieces of many sizes.
fn backward(shape: &Shape, setting: &Setting) -> i64 {
    let (state, bytes) = state(shape, setting);
    16 * state * bytes
}

/// The most that the head works with, and how much of it serves other purposes afterwards.
///
/// The pieces of a shared head stay with the thread that asked for them, and each thread comes to compute the share of
/// another sooner or later.
fn head(shape: &Shape, setting: &Setting) -> (i64, i64) {
    let (state, bytes) = state(shape, setting);
    let Setting { kind, device, threads, .. } = *setting;
    let rows = setting.micro_batch * shape.block_size;
    // The states' gradient in pieces and whole; with padding also the rows that count, and the gradient of all rows twice.
    let states = if setting.is_padded { 5 } else { 2 };
    let working = head::working_bytes(rows, shape.n_embd, shape.vocab_size, threads, kind, device);
    let states = states * state * bytes;
    match device {
        Device::Cpu if head::is_shared(shape.vocab_size * shape.n_embd, kind) => (working * threads.min(2) + states, 0),
        _ => (working + states, working),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_kept_where_no_kernel_draws_them_again() {
        let shape = Shape {
            vocab_size: 64,
            block_size: 16,
            n_layer: 2,
            n_head: 2,
            n_embd: 32,
            dropout: 0.0,
            norm: Norm::Pre,
            activation: Activation::Gelu,
            tied_head: true,
            bias: true,
            recompute: false,
        };
        let masks = |shape: &Shape, kind, device| {
            let (micro_batch, moments, threads) = (4, 0, 2);
            let flags = [false; 3];
            let [has_wire, is_padded, saves_meanwhile] = flags;
            let setting = Setting { micro_batch, kind, device, has_wire, moments, threads, is_padded, saves_meanwhile };
            block(&Shape { dropout: 0.1, ..*shape }, &setting) - block(shape, &setting)
        };
        let state = 4 * 16 * 32;
        assert_eq!(masks(&shape, Kind::BFloat16, Device::Cuda(0)), 0);
        assert_eq!(masks(&shape, Kind::Float, Device::Cuda(0)), 2 * state * 4);
        assert_eq!(masks(&Shape { norm: Norm::Post, ..shape }, Kind::BFloat16, Device::Cuda(0)), 2 * state * 2);
        assert!(masks(&shape, Kind::BFloat16, Device::Cpu) > 2 * state * 2);
    }
}
