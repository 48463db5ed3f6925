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

// Two sums at a time.
struct Pair {
  float a, b;
};

__device__ __forceinline__ Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }

__device__ __forceinline__ float other(float x, int lanes) { return __shfl_xor_sync(ALL, x, lanes); }
__device__ __forceinline__ Pair other(Pair x, int lanes) { return {other(x.a, lanes), other(x.b, lanes)}; }
__device__ __forceinline__ Sum other(Sum x, int lanes) { return {other(x.largest, lanes), other(x.sum, lanes)}; }

// The sum over the threads of a block, whole warps, which each of them gets; in one order, whoever is first. `none` adds
// nothing.
template <typename T>
__device__ __forceinline__ T add_up(T mine, T none) {
  __shared__ T warps[WARP];
  for (int lanes = WARP / 2; lanes; lanes /= 2) mine = mine + other(mine, lanes);
  int lane = threadIdx.x % WARP;
  __syncthreads();  // the last sum has been read
  if (lane == 0) warps[threadIdx.x / WARP] = mine;
  __syncthreads();
  T all = lane < blockDim.x / WARP ? warps[lane] : none;
  for (int lanes = WARP / 2; lanes; lanes /= 2) all = all + other(all, lanes);
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
  sum = add_up(sum, Sum{LOWEST, 0});

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

// Draws of a counter and a key: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
__device__ __forceinline__ void draw(unsigned* x, unsigned long long counter, unsigned long long key) {
  unsigned low = (unsigned)key, high = (unsigned)(key >> 32);
  x[0] = (unsigned)counter, x[1] = (unsigned)(counter >> 32), x[2] = x[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    unsigned a = 0xd2511f53 * x[0], b = 0xcd9e8d57 * x[2];
    unsigned c = __umulhi(0xcd9e8d57, x[2]) ^ x[1] ^ low, d = __umulhi(0xd2511f53, x[0]) ^ x[3] ^ high;
    x[0] = c, x[1] = b, x[2] = d, x[3] = a;
    low += 0x9e3779b9, high += 0xbb67ae85;
  }
}

// Dropout of eight numbers: of 65,536 as many become 0 as `dropped` says, and the others make up for them. The draws
// depend on the key and on which eight of a tensor these are, so that they are the same whenever they are made.
__device__ __forceinline__ void drop(float* x, long long eight, unsigned long long key, unsigned dropped) {
  if (!dropped) return;
  unsigned draws[4];
  draw(draws, eight, key);
  float scale = 65536.0f / (65536 - dropped);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = (draws[i / 2] >> i % 2 * 16 & 0xffff) < dropped ? 0 : x[i] * scale;
}

// sum = x + dropout(branch), and normed = its layer norm; either may be left out (null). A block takes one row after another,
// a thread eight of its `width` numbers, a multiple of 8. `stats` gets the mean and the reciprocal deviation of each row.
extern "C" __global__ void __launch_bounds__(512)
add_norm(const bf16* x, const bf16* branch, bf16* sum, const bf16* weight, const bf16* bias, bf16* normed, float* stats,
         int rows, int width, unsigned long long key, unsigned dropped) {
  int first = 8 * threadIdx.x;
  bool mine = first < width;
  float scale[8], shift[8] = {};
  if (mine && normed) load(scale, weight + first);
  if (mine && bias) load(shift, bias + first);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    long long place = (long long)row * width + first;
    float v[8] = {};
    if (mine) load(v, x + place);
    if (mine && branch) {
      float added[8];
      load(added, branch + place);
      drop(added, place / 8, key, dropped);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = wide(narrow(v[i] + added[i]));
      store(sum + place, v);
    }
    if (!normed) continue;
    float all = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) all += v[i];
    float mean = add_up(all, 0.0f) / width;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += mine ? (v[i] - mean) * (v[i] - mean) : 0;
    float deviation = rsqrtf(add_up(squares, 0.0f) / width + 1e-5f);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (v[i] - mean) * deviation * scale[i] + shift[i];
    if (mine) store(normed + place, v);
    if (threadIdx.x == 0) stats[2 * row] = mean, stats[2 * row + 1] = deviation;
  }
}

// The backward pass of add_norm: from the gradients of `sum` and of `normed` (null without a norm) those of `sum` as a whole,
// which is x's, and of the branch (null if it is the same). Each block adds up its rows' gradients of weight and bias, and
// leaves them in its part of `parts`, (blocks, 2, width): the sum over blocks is not its own.
extern "C" __global__ void __launch_bounds__(512)
add_norm_backward(const bf16* dsum, const bf16* dnormed, const bf16* sum, const float* stats, const bf16* weight, bf16* dx,
                  bf16* dbranch, float* parts, int rows, int width, unsigned long long key, unsigned dropped) {
  int first = 8 * threadIdx.x;
  bool mine = first < width;
  float scale[8], dweight[8] = {}, dbias[8] = {};
  if (mine && dnormed) load(scale, weight + first);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    long long place = (long long)row * width + first;
    float dv[8] = {};
    if (mine) load(dv, dsum + place);
    if (dnormed) {
      float d[8] = {}, v[8] = {};
      Pair means = {0, 0};
      float mean = stats[2 * row], deviation = stats[2 * row + 1];
      if (mine) {
        load(d, dnormed + place);
        load(v, sum + place);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          v[i] = (v[i] - mean) * deviation;
          dweight[i] += d[i] * v[i];
          dbias[i] += d[i];
          d[i] *= scale[i];
          means = means + Pair{d[i], d[i] * v[i]};
        }
      }
      means = add_up(means, Pair{0, 0});
      if (mine) {
#pragma unroll
        for (int i = 0; i < 8; i++)
          dv[i] = wide(narrow(dv[i] + deviation * (d[i] - (means.a + v[i] * means.b) / width)));
        store(dx + place, dv);
      }
    }
    if (mine && dbranch) {
      drop(dv, place / 8, key, dropped);
      store(dbranch + place, dv);
    }
  }
  if (mine && dnormed) {
    float* part = parts + 2LL * blockIdx.x * width + first;
#pragma unroll
    for (int i = 0; i < 8; i++) part[i] = dweight[i], part[width + i] = dbias[i];
  }
}

// An AdamW update (Loshchilov and Hutter 2019) of `n` weights from number `from` on, one to a thread, and of their bf16 copy.
//
// The gradient is scaled down if `norm`, that of all of it, is more than `clip` and that is above 0; nothing changes if it is
// not finite. The weights from the first of `cuts` to the second, from the third to the fourth, and so on decay.
extern "C" __global__ void __launch_bounds__(256)
adamw(float* weights, const float* grads, float* means, float* squares, bf16* copy, const double* norm,
      const long long* cuts, int n_cuts, long long from, long long n, float lr, float beta1, float beta2, float decay,
      float eps, float clip, float correction1, float correction2) {
  __shared__ float scale;
  if (threadIdx.x == 0) {
    double size = *norm + 1e-6;
    scale = !(size < 1e300) ? -1 : clip > 0 && size > clip ? clip / size : 1;
  }
  __syncthreads();
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (scale < 0 || i >= n) return;
  int passed = 0, end = n_cuts;  // the cuts at or before this weight
  while (passed < end) {
    int middle = (passed + end) / 2;
    if (cuts[middle] <= from + i) passed = middle + 1;
    else end = middle;
  }
  float gradient = scale * grads[i];
  float mean = means[i] + (1 - beta1) * (gradient - means[i]);
  float square = beta2 * squares[i] + (1 - beta2) * gradient * gradient;
  float weight = weights[i] * (passed % 2 ? 1 - lr * decay : 1);
  weight -= lr / correction1 * mean / (sqrtf(square) / correction2 + eps);
  means[i] = mean, squares[i] = square, weights[i] = weight;
  copy[i] = narrow(weight);
}
