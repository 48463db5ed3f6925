// What the three libraries of the emulated GPU share; driver.cpp has it.
//
// Memory of the emulated GPU is the host's. An operator runs when LibTorch launches it; a collective runs later, on its
// stream's own thread. Whether that is safe on a real GPU, which runs both whenever it likes, is not left to chance: every
// access to memory is checked against the last one by a happens-before clock (Lamport 1978; vector clocks as in Mattern
// 1989). Streams and the host are the clock's parties, and events carry it between them.

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

// Ends the process with a message: a test has found what it was made for.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
constexpr int FAILED = 99;

// The faults of EMULATED_GPU_FAULT, as NAME, NAME:K, NAME@RANK or NAME:K@RANK, joined by commas. K, counted from 1, is 1
// if it is not given. Whether this is the K-th call with this name, of a fault that was asked for on this rank.
bool fault(const std::string& name);
// Whether a fault of this name was asked for on this rank, whatever its K.
bool fault_is_set(const std::string& name);

// Adds to a figure of this process; EMULATED_GPU_LOG names the file that gets all of rank 0's at its end.
void count(const std::string& what, int64_t by = 1);

// GPUs that this process sees, by CUDA_VISIBLE_DEVICES and EMULATED_GPU_DEVICES; which of the machine's one is; and the
// one that this thread has made its own, as a driver's context.
int device_count();
int physical(int device);
int& current_device();

// LibTorch's stream, CUDA's legacy default stream of a device: what is launched on it runs at once, after the events it
// was told to wait for.
Stream* default_stream(int device);

// Something named `what` is launched on a stream and touches these bytes; fails if that is a race.
void launch(Stream* stream, const std::string& what, const std::vector<Range>& ranges);
// Also touches bytes, as part of the last launch: an operator's results.
void touch(Stream* stream, const std::string& what, const Range& range);
// The host waits for all that was launched on a default stream, and reads bytes: a copy to the host.
void read(Stream* stream, const std::string& what, const Range& range);
// The host waits for all that was launched on a default stream,
void wait_for(Stream* stream);
// or on every stream there is.
void synchronize();
// Memory goes back to where the default stream will take it from; fails if another stream may still use it.
void freed(Stream* stream, const Range& range);

// Gives a made stream's thread something to do; it returns whether it was done. If not, the stream is broken, and what
// comes after it there stays undone until `release`.
void enqueue(Stream* stream, std::function<bool()> work);
void release(Stream* stream);
Stream* made_stream(void* handle);

}  // namespace gpu
