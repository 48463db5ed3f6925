//! A CPU tensor's memory as a slice, and bf16's numbers.

use tch::{Device, Kind, Tensor};

/// The elements of a contiguous fp32 CPU tensor, in their order. Nothing may write to its storage as long as the slice lives,
/// through no other handle either.
///
/// # Panics
/// If the tensor is not contiguous, not fp32, or not on the CPU.
pub fn floats(tensor: &Tensor) -> &[f32] {
    check(tensor, Kind::Float);
    // SAFETY: checked above, `numel` floats lie at the data pointer; the borrow keeps the storage, which the caller lets
    // nobody write to.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// As [`floats`], to be written to. Nothing else may read or write this part of the storage as long as the slice lives.
///
/// # Panics
/// As [`floats`].
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor, Kind::Float);
    // SAFETY: checked above, `numel` floats lie at the data pointer; the exclusive borrow keeps the storage, whose other
    // handles the caller does not use meanwhile.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// As [`floats_mut`] for a bf16 tensor: each element's bits, the upper half of an fp32 number.
///
/// # Panics
/// As [`floats`], of bf16.
pub fn halves_mut(tensor: &mut Tensor) -> &mut [u16] {
    check(tensor, Kind::BFloat16);
    // SAFETY: as in `floats_mut`, with two bytes for an element.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u16>(), tensor.numel()) }
}

/// The nearest bf16 number, of two equally near ones the even one: its bits.
#[inline(always)]
pub fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // Of a NaN some bit of what makes it one is kept.
    let rounded = if x.is_nan() { bits >> 16 | 0x40 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 };
    rounded as u16
}

fn check(tensor: &Tensor, kind: Kind) {
    assert!(tensor.kind() == kind && tensor.device() == Device::Cpu && tensor.is_contiguous());
}
