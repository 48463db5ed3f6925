// An emulated libcuda.so: devices, streams, events, and the clock that finds races.

#include "gpu.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>

#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

namespace gpu {
namespace {

using Time = std::chrono::steady_clock::time_point;
using Clock = std::map<const Stream*, uint64_t>;

void join(Clock& mine, const Clock& other) {
  for (auto& [party, n] : other) mine[party] = std::max(mine[party], n);
}

// A point in a stream that its thread will reach.
struct Ticket {
  enum State { PENDING, BROKEN, DONE } state = PENDING;
  Time when{};
};
using Tickets = std::vector<std::shared_ptr<Ticket>>;

// The last access to some bytes.
struct Access {
  uintptr_t end;
  const Stream* by;
  uint64_t at;
  std::string what;
};

// Never destroyed: a stream's thread may still wait when the process ends.
auto& mutex = *new std::recursive_mutex;
auto& changed = *new std::condition_variable_any;
Clock host;
std::map<uintptr_t, Access> accesses;  // by the first byte; no two overlap
std::map<uintptr_t, size_t> allocations;

const char* variable(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

}  // namespace

struct Stream {
  std::string name, last;  // last: what was launched on it last
  explicit Stream(std::string name) : name(std::move(name)) {}
  Clock clock;
  Tickets waits;             // default stream: what the next launch has to wait for
  // Made stream: what its thread still has to do, and the tickets in that, in order.
  std::deque<std::function<bool()>> work;
  std::deque<std::shared_ptr<Ticket>> tickets;
  std::thread thread;
  bool broken = false, ended = false;

  uint64_t now() { return clock[this]; }
};

namespace {

struct Event {
  bool timed = true, recorded = false;
  Stream* stream = nullptr;
  Clock clock;
  Tickets tickets;
  Time when{};

  Ticket::State state() const {
    auto worst = Ticket::DONE;
    for (auto& ticket : tickets) worst = std::min(worst, ticket->state);
    return worst;
  }
};

void serve(Stream* stream) {
  std::unique_lock lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return stream->ended || (!stream->broken && !stream->work.empty()); });
    if (stream->work.empty()) return;
    auto work = stream->work.front();
    lock.unlock();
    bool done = work();
    lock.lock();
    stream->work.pop_front();
    if (!done) {
      stream->broken = true;
      for (auto& ticket : stream->tickets) ticket->state = Ticket::BROKEN;
    }
    changed.notify_all();
  }
}

// Fails unless the last accesses to these bytes happened before what the stream does now.
void check(Stream* stream, const std::string& what, const Range& range) {
  auto start = reinterpret_cast<uintptr_t>(range.start), end = start + range.length;
  auto place = accesses.upper_bound(start);
  if (place != accesses.begin() && std::prev(place)->second.end > start) --place;
  for (; place != accesses.end() && place->first < end; ++place) {
    auto& last = place->second;
    // A broken stream never does its remaining work.
    if (last.by != stream && stream->clock[last.by] < last.at && !last.by->broken)
      fail("RACE: %s on the %s touches %zu bytes at %p, of which %zu at %p were last touched by %s on the %s, and nothing "
           "orders the two", what.c_str(), stream->name.c_str(), range.length, range.start, size_t(last.end - place->first),
           reinterpret_cast<void*>(place->first), last.what.c_str(), last.by->name.c_str());
  }
}

// Makes room in the table of accesses.
void clear(const Range& range) {
  auto start = reinterpret_cast<uintptr_t>(range.start), end = start + range.length;
  auto place = accesses.upper_bound(start);
  if (place != accesses.begin() && std::prev(place)->second.end > start) --place;
  while (place != accesses.end() && place->first < end) {
    auto [from, access] = *place;
    place = accesses.erase(place);
    auto to = access.end;
    if (to > end) place = std::next(accesses.emplace(end, access).first);
    if (from < start) access.end = start, accesses.emplace(from, access);
  }
}

// The host learns how far a stream has got. Only a wait that leaves the stream with nothing to do costs time.
void learn(Stream* stream, const Clock& clock) {
  auto at = clock.find(stream);
  if (at != clock.end() && at->second == stream->now() && host[stream] < at->second) count("waits after " + stream->last);
  join(host, clock);
}

void wait_until_done(std::unique_lock<std::recursive_mutex>& lock, const Tickets& tickets) {
  // A broken collective never ends, but the host of a real GPU would not wait for it here.
  changed.wait(lock, [&] {
    for (auto& ticket : tickets)
      if (ticket->state == Ticket::PENDING) return false;
    return true;
  });
}

}  // namespace

void fail(const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "emulated GPU: %s\n", text);
  fflush(stderr);
  _exit(FAILED);
}

namespace {

// This process's rank from its launcher; 0 without one.
std::string rank() {
  for (auto name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"})
    if (*variable(name)) return variable(name);
  return "0";
}

struct Fault {
  std::string name;
  int at = 1, seen = 0;
};

std::vector<Fault>& faults() {
  static std::vector<Fault> all = [] {
    std::vector<Fault> all;
    std::string word;
    std::istringstream words(variable("EMULATED_GPU_FAULT"));
    while (std::getline(words, word, ',')) {
      auto at = word.find('@');
      if (at != std::string::npos && word.substr(at + 1) != rank()) continue;
      word = word.substr(0, at);
      auto colon = word.find(':');
      Fault fault{word.substr(0, colon)};
      if (colon != std::string::npos) fault.at = atoi(word.c_str() + colon + 1);
      all.push_back(fault);
    }
    return all;
  }();
  return all;
}

// Written when rank 0's process exits normally.
struct Figures {
  std::map<std::string, int64_t> all;
  ~Figures() {
    if (!*variable("EMULATED_GPU_LOG") || rank() != "0") return;
    std::ofstream file(variable("EMULATED_GPU_LOG"));
    for (auto& [what, n] : all) file << what << ' ' << n << '\n';
  }
} figures;

}  // namespace

bool fault(const std::string& name) {
  std::lock_guard lock(mutex);
  bool now = false;
  for (auto& fault : faults())
    if (fault.name == name && ++fault.seen == fault.at) now = true;
  return now;
}

bool fault_is_set(const std::string& name) {
  std::lock_guard lock(mutex);
  for (auto& fault : faults())
    if (fault.name == name) return true;
  return false;
}

void count(const std::string& what, int64_t by) {
  std::lock_guard lock(mutex);
  figures.all[what] += by;
}

bool count_launches = false;

void count_launch(const std::string& what, int64_t bytes) {
  if (!count_launches || !bytes) return;  // nothing is launched for nothing
  count("launches of " + what);
  count("bytes of " + what, bytes);
}

namespace {

// The numbers of the machine's GPUs that this process sees.
const std::vector<int>& visible() {
  static std::vector<int> all = [] {
    int there = *variable("EMULATED_GPU_DEVICES") ? atoi(variable("EMULATED_GPU_DEVICES")) : 1;
    std::vector<int> all;
    if (fault_is_set("no-device")) return all;
    if (!getenv("CUDA_VISIBLE_DEVICES")) {
      for (int n = 0; n < there; n++) all.push_back(n);
      return all;
    }
    std::istringstream words(variable("CUDA_VISIBLE_DEVICES"));
    std::string word;
    // Like CUDA, ignores everything from the first number on that is not a device's.
    while (std::getline(words, word, ',')) {
      if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos || stoi(word) >= there) break;
      all.push_back(stoi(word));
    }
    return all;
  }();
  return all;
}

}  // namespace

int device_count() { return static_cast<int>(visible().size()); }
int physical(int device) { return visible().at(device); }

int& current_device() {
  thread_local int device = 0;
  return device;
}

Stream* default_stream(int device) {
  std::lock_guard lock(mutex);
  static std::map<int, Stream*> all;
  auto& stream = all[device];
  if (!stream) stream = new Stream("default stream");
  return stream;
}

void launch(Stream* stream, const std::string& what, const std::vector<Range>& ranges) {
  std::unique_lock lock(mutex);
  wait_until_done(lock, stream->waits);
  auto& waits = stream->waits;
  waits.erase(std::remove_if(waits.begin(), waits.end(), [](auto& t) { return t->state == Ticket::DONE; }), waits.end());
  join(stream->clock, host);
  stream->clock[stream]++;
  stream->last = what;
  for (auto& range : ranges) touch(stream, what, range);
}

void touch(Stream* stream, const std::string& what, const Range& range) {
  std::lock_guard lock(mutex);
  if (!range.length) return;
  check(stream, what, range);
  clear(range);
  auto start = reinterpret_cast<uintptr_t>(range.start);
  accesses.emplace(start, Access{start + range.length, stream, stream->now(), what});
}

void read(Stream* stream, const std::string& what, const Range& range) {
  wait_for(stream);
  std::lock_guard lock(mutex);
  join(stream->clock, host);
  touch(stream, what, range);
}

void wait_for(Stream* stream) {
  std::unique_lock lock(mutex);
  wait_until_done(lock, stream->waits);
  learn(stream, stream->clock);
}

void allocated(const Range& range) {
  std::lock_guard lock(mutex);
  allocations[reinterpret_cast<uintptr_t>(range.start)] = range.length;
}

Range allocation(const void* memory) {
  std::lock_guard lock(mutex);
  auto address = reinterpret_cast<uintptr_t>(memory);
  auto place = allocations.upper_bound(address);
  if (place == allocations.begin()) return {nullptr, 0};
  auto [start, length] = *--place;
  return address < start + length ? Range{reinterpret_cast<void*>(start), length} : Range{nullptr, 0};
}

void freed(Stream* stream, const Range& range) {
  std::lock_guard lock(mutex);
  allocations.erase(reinterpret_cast<uintptr_t>(range.start));
  // The next user of these bytes is launched after this.
  join(stream->clock, host);
  check(stream, "freeing a buffer", range);
  clear(range);
}

void enqueue(Stream* stream, std::function<bool()> work) {
  std::lock_guard lock(mutex);
  stream->work.push_back(std::move(work));
  changed.notify_all();
}

void release(Stream* stream) {
  std::lock_guard lock(mutex);
  stream->broken = false;
  join(host, stream->clock);  // nothing of it is on the GPU any more
  changed.notify_all();
}

Stream* made_stream(void* handle) {
  if (!handle) fail("NCCL was given the default stream, on which it would wait for all that LibTorch computes");
  return static_cast<Stream*>(handle);
}

namespace {

std::vector<Stream*> made;

// A ticket for the current end of a made stream's work.
std::shared_ptr<Ticket> ticket_of(Stream* stream) {
  auto ticket = std::make_shared<Ticket>();
  if (stream->broken) ticket->state = Ticket::BROKEN;
  stream->tickets.push_back(ticket);
  enqueue(stream, [stream] {
    std::lock_guard lock(mutex);
    *stream->tickets.front() = {Ticket::DONE, std::chrono::steady_clock::now()};
    stream->tickets.pop_front();
    return true;
  });
  return ticket;
}

Stream* stream_of(void* handle) { return handle ? static_cast<Stream*>(handle) : default_stream(current_device()); }

}  // namespace

void synchronize() {
  std::unique_lock lock(mutex);
  for (auto* stream : made) {
    auto ticket = ticket_of(stream);
    // As on a GPU, this waits for ever if a collective hangs.
    changed.wait(lock, [&] { return ticket->state == Ticket::DONE; });
    join(host, stream->clock);
  }
  lock.unlock();
  for (int device = 0; device < device_count(); device++) wait_for(default_stream(device));
}

}  // namespace gpu

using namespace gpu;

// CUDA's driver interface, as far as Lockstep calls it. Results are CUresult's numbers.
extern "C" {

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_HANDLE = 400,
       NOT_FOUND = 500, NOT_READY = 600, SYSTEM_DRIVER_MISMATCH = 803 };

static int device_of(void* context) { return static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1; }
static void* context_of(int device) { return reinterpret_cast<void*>(static_cast<intptr_t>(device) + 1); }
static thread_local void* context = nullptr;

int cuInit(unsigned) {
  if (fault_is_set("driver")) return SYSTEM_DRIVER_MISMATCH;
  return device_count() ? SUCCESS : NO_DEVICE;
}
int cuDriverGetVersion(int* version) { return *version = fault_is_set("old-driver") ? 12020 : 13000, SUCCESS; }
int cuDeviceGetCount(int* n) { return *n = device_count(), SUCCESS; }
int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, ordinal < 0 || ordinal >= device_count() ? INVALID_DEVICE : SUCCESS;
}
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, length, "Emulated GPU"), SUCCESS; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t(1) << 34, SUCCESS; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = size_t(1) << 34, SUCCESS; }
int cuMemAlloc_v2(void** memory, size_t bytes) {
  allocated({*memory = aligned_alloc(512, (bytes + 511) / 512 * 512), bytes});
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  enum { PCI_BUS_ID = 33, PCI_DEVICE_ID = 34, PCI_DOMAIN_ID = 50, MAJOR = 75, MINOR = 76 };
  *value = attribute == PCI_BUS_ID ? 16 + physical(device) : attribute == MAJOR ? 9 : 0;
  return SUCCESS;
}

int cuGetErrorName(int error, const char** name) {
  static const std::map<int, const char*> names = {
      {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
      {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"}, {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
      {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
      {NOT_READY, "CUDA_ERROR_NOT_READY"}, {SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}};
  auto found = names.find(error);
  return *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second, SUCCESS;
}
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

int cuDevicePrimaryCtxRetain(void** made, int device) { return *made = context_of(device), SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void* wanted) {
  if ((context = wanted)) current_device() = device_of(wanted);
  return SUCCESS;
}
int cuCtxGetCurrent(void** now) { return *now = context, SUCCESS; }
int cuCtxGetDevice(int* device) { return *device = current_device(), SUCCESS; }
int cuCtxSynchronize() { return synchronize(), SUCCESS; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }

int cuStreamCreateWithPriority(void** handle, unsigned flags, int) {
  if (flags != 1) fail("a stream that is not CU_STREAM_NON_BLOCKING waits for the default stream, and hides nothing");
  std::lock_guard lock(mutex);
  auto* stream = new Stream("stream " + std::to_string(made.size() + 1));
  made.push_back(stream);
  stream->thread = std::thread(serve, stream);
  stream->thread.detach();  // a hanging collective must not hold the process
  return *handle = stream, SUCCESS;
}
int cuStreamCreate(void** handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }
int cuStreamDestroy_v2(void* handle) {
  std::lock_guard lock(mutex);
  auto* stream = static_cast<Stream*>(handle);
  stream->ended = true;  // its thread exits; the clocks may still name it
  made.erase(std::remove(made.begin(), made.end(), stream), made.end());
  changed.notify_all();
  return SUCCESS;
}

int cuEventCreate(void** handle, unsigned flags) {
  auto* event = new Event;
  event->timed = !(flags & 2);
  return *handle = event, SUCCESS;
}
int cuEventDestroy_v2(void* handle) { return delete static_cast<Event*>(handle), SUCCESS; }
int cuEventRecord(void* handle, void* on) {
  std::lock_guard lock(mutex);
  auto& event = *static_cast<Event*>(handle);
  event.stream = stream_of(on);
  event.recorded = true;
  event.clock = event.stream->clock;
  event.when = std::chrono::steady_clock::now();
  event.tickets = on ? Tickets{ticket_of(event.stream)} : event.stream->waits;
  return SUCCESS;
}
int cuEventQuery(void* handle) {
  std::lock_guard lock(mutex);
  auto& event = *static_cast<Event*>(handle);
  if (event.state() != Ticket::DONE) return NOT_READY;
  if (event.recorded) learn(event.stream, event.clock);
  return SUCCESS;
}
int cuEventSynchronize(void* handle) {
  std::unique_lock lock(mutex);
  auto& event = *static_cast<Event*>(handle);
  changed.wait(lock, [&] { return event.state() == Ticket::DONE; });
  if (event.recorded) learn(event.stream, event.clock);
  return SUCCESS;
}
int cuEventElapsedTime_v2(float* ms, void* from, void* to) {
  std::lock_guard lock(mutex);
  auto time = [](void* handle) {
    auto& event = *static_cast<Event*>(handle);
    auto when = event.when;
    for (auto& ticket : event.tickets) when = std::max(when, ticket->when);
    return when;
  };
  for (auto* handle : {from, to}) {
    auto& event = *static_cast<Event*>(handle);
    if (!event.timed || !event.recorded) return INVALID_HANDLE;
    if (event.state() != Ticket::DONE) return NOT_READY;
  }
  *ms = std::chrono::duration<float, std::milli>(time(to) - time(from)).count();
  return SUCCESS;
}

int cuStreamWaitEvent(void* on, void* handle, unsigned) {
  std::lock_guard lock(mutex);
  auto* stream = stream_of(on);
  auto& event = *static_cast<Event*>(handle);
  // These mutations leave out the ordering.
  if (fault_is_set(on ? "ignore-waits-of-nccl" : "ignore-waits-of-libtorch")) return SUCCESS;
  join(stream->clock, event.clock);
  if (!on) {
    stream->waits.insert(stream->waits.end(), event.tickets.begin(), event.tickets.end());
    return SUCCESS;
  }
  enqueue(stream, [tickets = event.tickets] {
    std::unique_lock lock(mutex);
    wait_until_done(lock, tickets);
    return true;
  });
  return SUCCESS;
}
int cuStreamSynchronize(void* on) {
  if (!on) return wait_for(default_stream(current_device())), SUCCESS;
  Event event;
  cuEventRecord(&event, on);
  return cuEventSynchronize(&event);
}

// The program's own kernels, compiled for the CPU by nvrtc.cpp: an image is a shared library's bytes, in which launch_NAME
// calls the kernel NAME for one thread.
int cuModuleLoadData(void** module, const void* image) {
  Elf64_Ehdr header;
  memcpy(&header, image, sizeof header);
  if (memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_type != ET_DYN) return INVALID_IMAGE;
  auto length = header.e_shoff + size_t(header.e_shentsize) * header.e_shnum;
  int file = memfd_create("kernels", 0);
  if (file < 0 || write(file, image, length) != static_cast<ssize_t>(length)) fail("no memory for a module");
  *module = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
  close(file);
  return *module ? SUCCESS : INVALID_IMAGE;
}
int cuModuleUnload(void* module) { return dlclose(module), SUCCESS; }

struct Kernel {
  std::string name;
  void (*function)(void**);
};
int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto* found = dlsym(module, (std::string("launch_") + name).c_str());
  if (!found) return NOT_FOUND;
  return *function = new Kernel{name, reinterpret_cast<void (*)(void**)>(found)}, SUCCESS;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void* on, void** parameters, void**) {
  if (on) fail("a kernel of the program's own runs beside LibTorch's; only the default stream is emulated for them");
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  auto& kernel = *static_cast<Kernel*>(function);
  run_kernel(kernel.name, kernel.function, grid, block, parameters);
  return SUCCESS;
}

}  // extern "C"
