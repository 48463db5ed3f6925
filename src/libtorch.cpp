// What LibTorch offers in C++ only: the switch for deterministic kernels, and its CUDA allocator's statistics.

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

extern "C" void lockstep_use_deterministic_algorithms() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
}

// The most bytes that LibTorch has held of a GPU's memory; -1 where it cannot say.
extern "C" int64_t lockstep_peak_device_bytes(int device) {
  try {
    auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)
                     ->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    return stats.reserved_bytes[0].peak;
  } catch (...) {
    return -1;
  }
}
