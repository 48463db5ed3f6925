// What LibTorch offers in C++ only: the switch for deterministic kernels, and its CUDA allocator's statistics.

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

extern "C" void lockstep_use_deterministic_algorithms() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
}

// The most bytes that tensors have taken of a GPU's memory; -1 where LibTorch cannot say.
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
