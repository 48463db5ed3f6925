//! What LibTorch offers in C++ only, through `src/torch/libtorch.cpp`.

use std::ffi::{c_char, c_int, c_void, CStr};

use tch::Tensor;

extern "C" {
    fn lockstep_use_deterministic_algorithms();
    fn lockstep_allow_cudnn_attention(allowed: bool);
    fn lockstep_keep_memory();
    fn lockstep_peak_device_bytes(device: c_int) -> i64;
    fn lockstep_forget_device_memory(device: c_int);
    fn lockstep_backward(output: *const c_void, gradient: *const c_void) -> *const c_char;
    fn lockstep_fused_adamw(
        tensors: *const *const c_void,
        n: usize,
        step: *const c_void,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        scale: *const c_void,
        skip: *const c_void,
    ) -> *const c_char;
}

/// The numbers of an AdamW update.
pub struct AdamWNumbers {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// One AdamW update in one pass, by LibTorch's fused kernel, which `tch` lacks.
///
/// A part is its weights, their gradient and its two moments, (n,) fp32 each. `step` counts from 1. The gradient is divided
/// by `scale`; if `skip` is 1, nothing is changed. These three are single fp32 numbers on the parts' device, for which
/// the host does not wait.
///
/// # Panics
/// With LibTorch's message if the kernel cannot be run, as `tch` does.
pub fn fused_adamw(parts: &[[Tensor; 4]], step: &Tensor, numbers: &AdamWNumbers, scale: &Tensor, skip: &Tensor) {
    if parts.is_empty() {
        return;
    }
    let tensors: Vec<_> = parts.iter().flatten().map(address).collect();
    let AdamWNumbers { lr, betas: [beta1, beta2], weight_decay, eps } = *numbers;
    let (n, step, scale, skip) = (parts.len(), address(step), address(scale), address(skip));
    // SAFETY: `tensors` holds four addresses for each of the n parts, all alive. LibTorch checks their shapes, types and devices; every C++ exception is caught.
    let error =
        unsafe { lockstep_fused_adamw(tensors.as_ptr(), n, step, lr, beta1, beta2, weight_decay, eps, scale, skip) };
    panic_if(error);
}

/// Adds the gradients of the leaves that `output` was computed from, given its own: `gradient`, of its shape and type.
/// `tch` lacks it, and has it only for a single number; the detour over `(output * gradient).sum()` costs two passes over
/// every element.
///
/// # Panics
/// With LibTorch's message if there is nothing to derive, as `tch` does.
pub fn backward(output: &Tensor, gradient: &Tensor) {
    // SAFETY: both are alive; LibTorch checks shapes and types; every C++ exception is caught.
    panic_if(unsafe { lockstep_backward(address(output), address(gradient)) });
}

/// A tch tensor's address is that of a C++ `at::Tensor`, alive as long as it.
fn address(tensor: &Tensor) -> *const c_void {
    tensor.as_ptr().cast()
}

fn panic_if(error: *const c_char) {
    if !error.is_null() {
        // SAFETY: not null, it is a text that ends in zero and stays until this thread's next call of LibTorch.
        panic!("{}", unsafe { CStr::from_ptr(error) }.to_string_lossy());
    }
}

/// Asks cuBLAS and NCCL for sums that have an order, by the variables that they read when they are first used; on the
/// first of them LibTorch insists for deterministic kernels. What the user has set is kept. To be called while this
/// process has no other thread: environments are not theirs to share.
///
/// NCCL's NVLS and NVLSTree add inside the NVLink switch, in whatever order the numbers arrive there; its rings and trees
/// add in the order of the ranks. It takes the variable for all collectives, so that those which add nothing lose NVLS too.
pub fn ask_for_deterministic_libraries() {
    for (name, value) in [("CUBLAS_WORKSPACE_CONFIG", ":4096:8"), ("NCCL_ALGO", "^NVLS,NVLSTree")] {
        if std::env::var_os(name).is_none() {
            std::env::set_var(name, value);
        }
    }
}

/// Asks LibTorch for kernels whose sums have an order, on CUDA too; those that have none become an error. To be called
/// after [`select`](super::select) and before the first product on a GPU.
///
/// LibTorch would then also fill new memory before its first use, for programs that read what they never wrote; this one
/// does not, and does without the time that it takes.
pub fn use_deterministic_kernels() {
    // SAFETY: sets two flags of LibTorch's global context, which exists from its loading on.
    unsafe { lockstep_use_deterministic_algorithms() };
}

/// Lets LibTorch take cuDNN's attention kernels on a GPU, or forbids it; forbidden from the moment a GPU is selected.
///
/// LibTorch prefers them on new GPUs (H100 and its successors), for which they are its fastest. But they round
/// dropout's probability to sixteenths ([`cudnn_attention_is_exact`]), and cuDNN builds a plan for each new shape,
/// which takes longer than the attention itself: right for training in one fixed shape, wrong for batches and prompts
/// of many lengths. LibTorch's own flash attention, which it takes otherwise, does neither.
pub fn allow_cudnn_attention(allowed: bool) {
    // SAFETY: sets a flag of LibTorch's global context, which exists from its loading on.
    unsafe { lockstep_allow_cudnn_attention(allowed) };
}

/// Whether cuDNN's attention drops with this very probability: it is rounded to sixteenths there.
pub fn cudnn_attention_is_exact(dropout: f64) -> bool {
    (dropout * 16.0).fract() == 0.0
}

/// Keeps the memory of tensors that are gone for those to come. glibc would give large pieces back to the system at once, and a
/// training step on a CPU, which asks for the same ones again and again, would spend a tenth of its time on new pages.
pub fn keep_memory() {
    // SAFETY: two calls of glibc's mallopt, which any thread may make at any time.
    unsafe { lockstep_keep_memory() };
}

/// The most bytes that tensors have taken of a GPU's memory; `None` if LibTorch cannot say.
pub(super) fn peak_bytes(gpu: usize) -> Option<i64> {
    // SAFETY: asks LibTorch's allocator, which was made when the first tensor went to this GPU, and catches every C++
    // exception.
    let bytes = unsafe { lockstep_peak_device_bytes(gpu as c_int) };
    (bytes >= 0).then_some(bytes)
}

/// Gives back a GPU's memory that no tensor has any more, and counts the peak from what is left.
pub(super) fn forget_memory(gpu: usize) {
    // SAFETY: as in `peak_bytes`.
    unsafe { lockstep_forget_device_memory(gpu as c_int) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_in_whole_sixteenths_is_exact() {
        for exact in [0.0, 0.0625, 0.125, 0.25, 0.5] {
            assert!(cudnn_attention_is_exact(exact), "{exact}");
        }
        for rounded in [0.1, 0.05, 0.2, 0.3, 0.0624] {
            assert!(!cudnn_attention_is_exact(rounded), "{rounded}");
        }
    }
}
