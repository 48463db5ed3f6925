//! A CPU tensor's memory as a slice.

use tch::{Device, Kind, Tensor};

/// The elements of a contiguous fp32 CPU tensor, in their order. Nothing may write to its storage as long as the slice lives,
/// through no other handle either.
///
/// # Panics
/// If the tensor is not contiguous, not fp32, or not on the CPU.
pub fn floats(tensor: &Tensor) -> &[f32] {
    check(tensor);
    // SAFETY: checked above, `numel` floats lie at the data pointer; the borrow keeps the storage, which the caller lets
    // nobody write to.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

/// As [`floats`], to be written to. Nothing else may read or write this part of the storage as long as the slice lives.
///
/// # Panics
/// As [`floats`].
pub fn floats_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor);
    // SAFETY: checked above, `numel` floats lie at the data pointer; the exclusive borrow keeps the storage, whose other
    // handles the caller does not use meanwhile.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) }
}

fn check(tensor: &Tensor) {
    assert!(tensor.kind() == Kind::Float && tensor.device() == Device::Cpu && tensor.is_contiguous());
}
