// The emulated GPU's processor: runs the program's own kernels as nvrtc.cpp has compiled them for the CPU.
//
// Blocks run one after another, and the threads of a block as fibers: each until it waits for its warp or its block. The
// compiler has put a call before every access to memory, which ThreadSanitizer would answer; here they are counted, and
// tell which tensors a kernel touches.

#include "gpu.h"

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <unordered_set>

#include <dlfcn.h>
#include <ucontext.h>

struct Index {
  unsigned x, y, z;
} threadIdx, blockIdx, blockDim, gridDim;

namespace gpu {
namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 1 << 15;

struct Fiber {
  enum State { READY, AT_WARP, AT_BLOCK, DONE } state = READY;
  bool begun = false;
  jmp_buf place;
  ucontext_t begin;
  std::unique_ptr<char[]> stack{new char[STACK]};
  uint64_t given[2] = {};  // two, as a fast lane may give the next while a slow one has not got the last
  unsigned shuffles = 0;
};

// The kernel that runs.
std::string name;
void (*body)(void**);
void** arguments;
std::vector<std::unique_ptr<Fiber>> fibers;
unsigned current;
jmp_buf scheduler;

// A tensor's memory, and the part of it that the kernel touches.
struct Touched {
  uintptr_t start, end, low, high;
};
std::vector<Touched> all_touched;
size_t last_touched;
std::unordered_map<uintptr_t, unsigned> readers;  // of this block
std::unordered_set<uintptr_t> own_pages;          // of a kernel's shared memory, and of its thread's number
constexpr uintptr_t PAGE = 4096;
int64_t bytes;
const bool counts = getenv("EMULATED_GPU_LOG");

void wait(Fiber::State state) {
  auto& mine = *fibers[current];
  mine.state = state;
  if (!_setjmp(mine.place)) _longjmp(scheduler, 1);
}

void live() {
  while (true) {
    body(arguments);
    wait(Fiber::DONE);
  }
}

void resume(unsigned thread) {
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  auto& fiber = *fibers[thread];
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack.get();
  fiber.begin.uc_stack.ss_size = STACK;
  makecontext(&fiber.begin, live, 0);
  setcontext(&fiber.begin);
}

// Lets the threads from..to go on if all of them wait for each other. Returns whether they did, or are done.
bool release(unsigned from, unsigned to, Fiber::State state) {
  for (unsigned i = from; i < to; i++)
    if (fibers[i]->state != state) return false;
  if (state != Fiber::DONE)
    for (unsigned i = from; i < to; i++) fibers[i]->state = Fiber::READY;
  return true;
}

void run_block(unsigned threads) {
  readers.clear();
  for (unsigned i = 0; i < threads; i++) fibers[i]->state = Fiber::READY;
  while (!release(0, threads, Fiber::DONE)) {
    bool moved = false;
    for (unsigned i = 0; i < threads; i++)
      if (fibers[i]->state == Fiber::READY) resume(i), moved = true;
    for (unsigned i = 0; i < threads; i += WARP) release(i, std::min(i + WARP, threads), Fiber::AT_WARP);
    release(0, threads, Fiber::AT_BLOCK);
    if (!moved) fail("the threads of a block of the kernel %s wait for different things, for ever", name.c_str());
  }
}

// What several threads of a block read counts once, as they share it through a cache. What a thread reads again counts.
void access(const void* memory, size_t size, bool writes) {
  auto start = reinterpret_cast<uintptr_t>(memory), end = start + size;
  auto stack = reinterpret_cast<uintptr_t>(fibers[current]->stack.get());
  if (start >= stack && end <= stack + STACK) return;
  if (own_pages.count(start / PAGE)) return;
  auto place = last_touched;
  auto is_there = [&](auto& touched) { return start >= touched.start && end <= touched.end; };
  if (place >= all_touched.size() || !is_there(all_touched[place]))
    place = std::find_if(all_touched.begin(), all_touched.end(), is_there) - all_touched.begin();
  if (place == all_touched.size()) {
    auto whole = allocation(memory);
    auto first = reinterpret_cast<uintptr_t>(whole.start), last = first + whole.length;
    if (!whole.length || end > last) {
      Dl_info info;
      if (dladdr(memory, &info)) return void(own_pages.insert(start / PAGE));
      fail("the kernel %s %s %zu bytes at %p, where no tensor is", name.c_str(), writes ? "writes" : "reads", size, memory);
    }
    all_touched.push_back({first, last, start, end});
  }
  last_touched = place;
  auto& touched = all_touched[place];
  touched.low = std::min(touched.low, start);
  touched.high = std::max(touched.high, end);
  if (!counts) return;
  if (writes || readers.emplace(start, current).first->second == current) bytes += static_cast<int64_t>(size);
}

}  // namespace

void run_kernel(const std::string& kernel, void (*function)(void**), const unsigned* grid, const unsigned* block,
                void** parameters) {
  name = kernel, body = function, arguments = parameters;
  all_touched.clear(), last_touched = 0, bytes = 0;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  unsigned threads = block[0] * block[1] * block[2];
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  auto* stream = default_stream(current_device());
  launch(stream, name, {});
  for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block(threads);
  for (auto& [start, end, low, high] : all_touched) touch(stream, name, {reinterpret_cast<void*>(low), high - low});
  count_launch(name, bytes);
}

}  // namespace gpu

using namespace gpu;

extern "C" {

void __syncthreads() { wait(Fiber::AT_BLOCK); }

uint64_t emulated_shuffle(uint64_t bits, unsigned lane) {
  unsigned turn = fibers[current]->shuffles++ % 2, other = current / WARP * WARP + lane;
  fibers[current]->given[turn] = bits;
  wait(Fiber::AT_WARP);
  return fibers[other]->given[turn];
}

#define ACCESS(size)                                                         \
  void __tsan_read##size(void* memory) { access(memory, size, false); }     \
  void __tsan_write##size(void* memory) { access(memory, size, true); }     \
  void __tsan_unaligned_read##size(void* memory) { access(memory, size, false); } \
  void __tsan_unaligned_write##size(void* memory) { access(memory, size, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* memory, size_t size) { access(memory, size, false); }
void __tsan_write_range(void* memory, size_t size) { access(memory, size, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
