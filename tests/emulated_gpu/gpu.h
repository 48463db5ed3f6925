// What the libraries of the emulated GPU share; driver.cpp and kernels.cpp implement it.
//
// The emulated GPU's memory is the host's. An operator runs when LibTorch launches it; a collective runs later, on its
// stream's own thread. A real GPU runs both whenever it likes. To test that this is safe, every memory access is
// checked against the last one with a happens-before clock (Lamport 1978; vector clocks as in Mattern 1989). Streams
// and the host are the clock's parties, and events carry it between them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace gpu {

struct Stream;

// Bytes that something reads or writes. Reads count as writes: nothing in Lockstep reads on two streams at once.
struct Range {
  const void* start;
  size_t length;
};

// Ends the process with a message: a test has found an error of the kind it looks for.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
constexpr int FAILED = 99;

// The faults of EMULATED_GPU_FAULT, as NAME, NAME:K, NAME@RANK or NAME:K@RANK, joined by commas. K counts from 1 and
// defaults to 1. Returns whether this is the K-th call with this name, for a fault that was asked for on this rank.
bool fault(const std::string& name);
// Whether a fault of this name was asked for on this rank, whatever its K.
bool fault_is_set(const std::string& name);

// Adds to a figure of this process. At its end, rank 0 writes all of its figures to the file EMULATED_GPU_LOG.
void count(const std::string& what, int64_t by = 1);

// Adds a launch and the bytes that it moves to the figures, once the first batch has come: what is measured before takes as
// many as it has time for.
void count_launch(const std::string& what, int64_t bytes);
extern bool count_launches;

// The number of GPUs that this process sees, by CUDA_VISIBLE_DEVICES and EMULATED_GPU_DEVICES; a GPU's number on the
// machine; and the GPU that is current for this thread, like a driver's context.
int device_count();
int physical(int device);
int& current_device();

// LibTorch's stream, CUDA's legacy default stream of a device. A launch on it runs at once, after the events that the
// stream was told to wait for.
Stream* default_stream(int device);

// Launches something named `what` on a stream, which touches these bytes; fails if that is a race.
void launch(Stream* stream, const std::string& what, const std::vector<Range>& ranges);
// Also touches bytes, as part of the last launch: an operator's results.
void touch(Stream* stream, const std::string& what, const Range& range);
// The host waits for all that was launched on a default stream, and reads bytes: a copy to the host.
void read(Stream* stream, const std::string& what, const Range& range);
// The host waits for all that was launched on a default stream,
void wait_for(Stream* stream);
// or on every stream.
void synchronize();
// A tensor's memory, from its making until `freed`; and which a byte belongs to, of length 0 if to none.
void allocated(const Range& range);
Range allocation(const void* memory);
// Returns memory to the pool from which the default stream takes it; fails if another stream may still use it.
void freed(Stream* stream, const Range& range);

// Runs a kernel of the program's own on the default stream: `function` is one thread's work.
void run_kernel(const std::string& name, void (*function)(void**), const unsigned* grid, const unsigned* block,
                void** parameters);

// Gives a made stream's thread some work, which returns whether it was done. If not, the stream is broken, and the work
// after it stays undone until `release`.
void enqueue(Stream* stream, std::function<bool()> work);
void release(Stream* stream);
Stream* made_stream(void* handle);

}  // namespace gpu
