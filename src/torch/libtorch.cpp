// What LibTorch offers in C++ only: the switches for deterministic kernels and for cuDNN's attention, its CUDA allocator's
// statistics, a backward pass from a given gradient, and AdamW in one kernel; and how glibc keeps what LibTorch gives back.

#include <malloc.h>

#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>

extern "C" void lockstep_use_deterministic_algorithms() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

extern "C" void lockstep_allow_cudnn_attention(bool allowed) { at::globalContext().setSDPUseCuDNN(allowed); }

extern "C" void lockstep_keep_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

// The most bytes that tensors have taken of a GPU's memory; -1 if LibTorch cannot say.
extern "C" int64_t lockstep_peak_device_bytes(int device) {
  try {
    auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)
                     ->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    return stats.allocated_bytes[0].peak;
  } catch (...) {
    return -1;
  }
}

// Gives back a GPU's memory that no tensor has any more, and counts the peak from what is left.
extern "C" void lockstep_forget_device_memory(int device) {
  try {
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    allocator->emptyCache();
    allocator->resetPeakStats(static_cast<c10::DeviceIndex>(device));
  } catch (...) {
    // The figure is then too high by a measurement's matrices.
  }
}

// Runs `f`; returns what went wrong, until the thread's next call, or null.
template <typename F>
static const char* message_of(F f) {
  thread_local std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "LibTorch failed, and does not say why";
  }
  return error.c_str();
}

// Adds the gradients of the leaves that `output` was computed from, given its own. Returns what went wrong, or null.
extern "C" const char* lockstep_backward(const at::Tensor* output, const at::Tensor* gradient) {
  return message_of([&] { output->backward(*gradient); });
}

// Updates `n` parts, each of which is four of `tensors`: weights, gradient, and both moments. The gradient is divided by
// `scale`; nothing changes if `skip` is 1. Returns what went wrong, or null.
extern "C" const char* lockstep_fused_adamw(at::Tensor* const* tensors, size_t n, const at::Tensor* step, double lr,
                                            double beta1, double beta2, double weight_decay, double eps,
                                            const at::Tensor* scale, const at::Tensor* skip) {
  return message_of([&] {
    std::vector<at::Tensor> lists[4];
    for (size_t i = 0; i < 4 * n; i++) lists[i % 4].push_back(*tensors[i]);
    std::vector<at::Tensor> steps(n, *step);
    at::_fused_adamw_(lists[0], lists[1], lists[2], lists[3], /*max_exp_avg_sqs=*/{}, steps, lr, beta1, beta2,
                      weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false, *scale, *skip);
  });
}
