// Lockstep's own kernels: what LibTorch would do in many passes over memory, in one.
//
// They are compiled for the GPU at hand when it is first used (kernels.rs), and for the CPU by the tests' emulated GPU
// (tests/emulated_gpu), which runs each thread of a block and counts the bytes. So they are plain CUDA C without headers.
// Every sum has an order that does not depend on the GPU's: no atomics. A thread reads and writes 16 bytes at a time.

typedef unsigned short bf16;  // the upper half of a float

__device__ __forceinline__ float wide(unsigned x) { return __uint_as_float(x << 16); }

// Rounds to the nearest, to even in the middle. NaN stays NaN.
__device__ __forceinline__ unsigned narrow(float x) {
  unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Eight numbers, which a thread reads or writes at a time: 16 bytes.
__device__ __forceinline__ void load(float* x, const bf16* from) {
  uint4 bits = *(const uint4*)from;
  unsigned pairs[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = wide(pairs[i]), x[2 * i + 1] = wide(pairs[i] >> 16);
}

__device__ __forceinline__ void store(bf16* to, const float* x) {
  unsigned pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = narrow(x[2 * i]) | narrow(x[2 * i + 1]) << 16;
  *(uint4*)to = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

constexpr unsigned ALL = 0xffffffff;  // lanes of a warp
constexpr int WARP = 32;
constexpr float LOWEST = -3.4e38f;    // below every logit, and finite: its distance to another is no NaN

// The logarithm of a sum of exponentials on its way: the largest exponent, and the sum relative to it.
struct Sum {
  float largest, sum;
};

__device__ __forceinline__ Sum operator+(Sum a, Sum b) {
  float largest = fmaxf(a.largest, b.largest);
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

__device__ __forceinline__ Sum shuffle_xor(Sum sum, int lanes) {
  return {__shfl_xor_sync(ALL, sum.largest, lanes), __shfl_xor_sync(ALL, sum.sum, lanes)};
}

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(ALL, x, lanes); }

// The sum over a block of THREADS threads, which each of them gets; in one order, whoever is first. `none` adds nothing.
template <int THREADS, typename T>
__device__ __forceinline__ T add_up(T mine, T none) {
  __shared__ T warps[WARP];
  for (int lanes = WARP / 2; lanes; lanes /= 2) mine = mine + shuffle_xor(mine, lanes);
  int lane = threadIdx.x % WARP;
  if (lane == 0) warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  T all = lane < THREADS / WARP ? warps[lane] : none;
  for (int lanes = WARP / 2; lanes; lanes /= 2) all = all + shuffle_xor(all, lanes);
  return all;
}

// Loss and gradient of a row of logits, in its place; a block for each row.
//
// Of the `stride` numbers of a row, a multiple of 8, the first `words` are logits; the others get a gradient of 0. They
// are read twice and written once. The loss is weight * -log softmax(logits)[target], and its gradient
// weight * (softmax - one-hot). Weights lie `weight_stride` apart: 0 if all rows have the same.
extern "C" __global__ void __launch_bounds__(512)
cross_entropy(bf16* logits, const long long* targets, const float* weights, float* losses, int words, int stride,
              int weight_stride) {
  __shared__ float picked;  // the target's logit
  bf16* mine = logits + (long long)blockIdx.x * stride;
  int target = (int)targets[blockIdx.x];
  float weight = weights[(long long)blockIdx.x * weight_stride];

  Sum sum = {LOWEST, 0};
  for (int first = 8 * threadIdx.x; first < words; first += 8 * blockDim.x) {
    float x[8];
    load(x, mine + first);
    Sum eight = {LOWEST, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (first + i == target) picked = x[i];
      if (first + i < words) eight.largest = fmaxf(eight.largest, x[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (first + i < words) eight.sum += __expf(x[i] - eight.largest);
    sum = sum + eight;
  }
  sum = add_up<512>(sum, Sum{LOWEST, 0});

  float scale = weight / sum.sum;
  for (int first = 8 * threadIdx.x; first < stride; first += 8 * blockDim.x) {
    float x[8];
    load(x, mine + first);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float gradient = scale * __expf(x[i] - sum.largest) - (first + i == target ? weight : 0);
      x[i] = first + i < words ? gradient : 0;
    }
    store(mine + first, x);
  }
  if (threadIdx.x == 0) losses[blockIdx.x] = weight * (logf(sum.sum) + sum.largest - picked);
}
