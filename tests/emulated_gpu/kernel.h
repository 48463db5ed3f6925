// CUDA C for a CPU, as far as src/torch/kernels.cu goes: nvrtc.cpp puts this before the source. kernels.cpp runs it.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

extern "C" void __syncthreads();
// Gives this lane's bits to its warp, and gets another lane's.
extern "C" uint64_t emulated_shuffle(uint64_t bits, unsigned lane);

#define UNCOUNTED __attribute__((no_sanitize_thread))  // what is no work of the kernel's

template <typename T>
UNCOUNTED inline T __shfl_xor_sync(unsigned, T value, int lanes) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulated_shuffle(bits, threadIdx.x % 32 ^ lanes);
  memcpy(&value, &bits, sizeof value);
  return value;
}

UNCOUNTED inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
UNCOUNTED inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }

// Calls a kernel with what the driver was given for it.
template <typename... A, size_t... I>
UNCOUNTED void emulated_call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(parameters[I])...);
}
template <typename... A>
UNCOUNTED void emulated_call(void (*kernel)(A...), void** parameters) {
  emulated_call(kernel, parameters, std::index_sequence_for<A...>());
}
