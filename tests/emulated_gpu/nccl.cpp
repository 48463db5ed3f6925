// An emulated libnccl.so: collectives among processes of this machine, through shared memory. They add in the order of
// the ranks, on the thread of the stream that they were given.
//
// The communicator is non-blocking as NCCL documents it: a call is accepted only after ncclCommGetAsyncError has been
// polled for a while. Until then no other call may be made, and nothing is on the stream.

#include "gpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum Type { INT32 = 2, INT64 = 4, FLOAT16 = 6, FLOAT32 = 7, FLOAT64 = 8, BFLOAT16 = 9 };

constexpr int MOST_RANKS = 64;
constexpr size_t CHUNK = 1 << 20;  // bytes that a rank shows the others at a time
constexpr int POLLS = 3;           // for how many polls a call is in progress

struct Id {
  char name[128];
};

// What the ranks share. A rank's number of arrivals is the number of barriers that it has reached.
struct Shared {
  std::atomic<int> joined;
  std::atomic<uint64_t> arrivals[MOST_RANKS];
  char place[MOST_RANKS][128];     // host and GPU
  char what[MOST_RANKS][128];      // the collective that the rank is in
  char data[MOST_RANKS][CHUNK];
};

struct Operation {
  std::string name;
  std::function<bool()> run;
  std::vector<gpu::Range> ranges;
};

// What a call has begun but not yet put on the stream.
struct Pending {
  gpu::Stream* stream;
  std::vector<Operation> operations;
};

struct Comm {
  int rank, size, device;
  Shared* shared = nullptr;
  std::atomic<bool> aborted{false};
  std::atomic<int> state{SUCCESS};
  uint64_t arrivals = 0;
  int polls = 0;
  std::vector<Pending> pending;
  gpu::Stream* stream = nullptr;
  std::string error;
  std::mutex mutex;
  std::atomic<bool> joining{false};

  // Waits until every rank is here; false if the communicator was aborted meanwhile. A rank that is gone never arrives,
  // and nobody is told, as between GPUs.
  bool barrier() {
    shared->arrivals[rank] = ++arrivals;
    for (int other = 0; other < size; other++)
      while (shared->arrivals[other] < arrivals) {
        if (aborted) return false;
        usleep(20);
      }
    return true;
  }
};

void log(const Comm* comm, const std::string& text) {
  auto* level = getenv("NCCL_DEBUG");
  if (!level || strcmp(level, "INFO")) return;
  std::string path = getenv("NCCL_DEBUG_FILE") ? getenv("NCCL_DEBUG_FILE") : "/dev/stderr";
  for (size_t at; (at = path.find("%p")) != std::string::npos;) path.replace(at, 2, std::to_string(getpid()));
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  std::ofstream(path, std::ios::app) << host << ':' << getpid() << ':' << syscall(SYS_gettid) << " [" << comm->device
                                     << "] NCCL INFO " << text << std::endl;
}

size_t size_of(int type) {
  switch (type) {
    case INT32: case FLOAT32: return 4;
    case INT64: case FLOAT64: return 8;
    case FLOAT16: case BFLOAT16: return 2;
    default: gpu::fail("NCCL was given a type of number %d, which is not emulated", type);
  }
}

float of_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float number;
  memcpy(&number, &wide, 4);
  return number;
}

uint16_t to_bf16(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  if (number != number) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float of_fp16(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY) : ldexpf(exponent ? fraction + 1024 : fraction, std::max(exponent, 1) - 25);
  return bits >> 15 ? -size : size;
}

uint16_t to_fp16(float number) {
  uint16_t sign = std::signbit(number) << 15;
  if (number != number) return 0x7e00;
  if (number == 0 || std::isinf(number)) return sign | (number == 0 ? 0 : 0x7c00);
  int exponent = std::max(ilogbf(number), -14);
  // The fraction's highest bit, which is not stored, adds 1 to the exponent.
  int bits = ((exponent + 14) << 10) + static_cast<int>(nearbyintf(ldexpf(std::fabs(number), 10 - exponent)));
  return sign | std::min(bits, 0x7c00);
}

template <uint16_t (*to)(float), float (*of)(uint16_t)>
void add_short(void* sum, const void* more, size_t n) {
  auto* numbers = static_cast<uint16_t*>(sum);
  for (size_t i = 0; i < n; i++) numbers[i] = to(of(numbers[i]) + of(static_cast<const uint16_t*>(more)[i]));
}

template <typename T>
void add(void* sum, const void* more, size_t n) {
  for (size_t i = 0; i < n; i++) static_cast<T*>(sum)[i] += static_cast<const T*>(more)[i];
}

void add(int type, void* sum, const void* more, size_t n) {
  switch (type) {
    case INT32: return add<int32_t>(sum, more, n);
    case INT64: return add<int64_t>(sum, more, n);
    case FLOAT32: return add<float>(sum, more, n);
    case FLOAT64: return add<double>(sum, more, n);
    case FLOAT16: return add_short<to_fp16, of_fp16>(sum, more, n);
    case BFLOAT16: return add_short<to_bf16, of_bf16>(sum, more, n);
    default: gpu::fail("NCCL was given a sum of type %d, which is not emulated", type);
  }
}

const char* at(const void* start, size_t bytes) { return static_cast<const char*>(start) + bytes; }
char* at(void* start, size_t bytes) { return static_cast<char*>(start) + bytes; }

// Every rank shows its bytes at `from`, chunk by chunk; `take` gets each rank's, in the order of the ranks.
template <typename Take>
bool exchange(Comm* comm, const void* from, size_t bytes, Take take) {
  for (size_t done = 0; done < bytes; done += CHUNK) {
    size_t length = std::min(CHUNK, bytes - done);
    if (from) memcpy(comm->shared->data[comm->rank], at(from, done), length);
    if (!comm->barrier()) return false;
    for (int rank = 0; rank < comm->size; rank++) take(rank, done, comm->shared->data[rank], length);
    if (!comm->barrier()) return false;
  }
  return true;
}

// The sum of all ranks' numbers, for `root`, or for all if that is -1.
bool reduce(Comm* comm, const void* from, void* to, size_t count, int type, int root) {
  return exchange(comm, from, count * size_of(type), [=](int rank, size_t done, const char* data, size_t length) {
    if (root >= 0 && root != comm->rank) return;
    if (rank == 0)
      memcpy(at(to, done), data, length);
    else
      add(type, at(to, done), data, length / size_of(type));
  });
}

bool broadcast(Comm* comm, const void* from, void* to, size_t bytes, int root) {
  return exchange(comm, comm->rank == root ? from : nullptr, bytes, [=](int rank, size_t done, const char* data, size_t n) {
    if (rank == root) memcpy(at(to, done), data, n);
  });
}

// All ranks must be in the same collective.
bool agree(Comm* comm, const std::string& what) {
  snprintf(comm->shared->what[comm->rank], sizeof comm->shared->what[0], "%s", what.c_str());
  if (!comm->barrier()) return false;
  for (int rank = 0; rank < comm->size; rank++)
    if (what != comm->shared->what[rank])
      gpu::fail("rank %d is in %s and rank %d in %s", comm->rank, what.c_str(), rank, comm->shared->what[rank]);
  return comm->barrier();
}

thread_local int group_depth = 0;
thread_local std::map<Comm*, Pending> group;

Result refuse(Comm* comm, Result result, const std::string& why) {
  comm->error = why;
  return result;
}

// Makes what was begun wait for the polls to come.
Result begin(Comm* comm, Pending pending) {
  comm->pending.push_back(std::move(pending));
  comm->polls = POLLS;
  return IN_PROGRESS;
}

// Puts operations on the stream.
void put(Comm* comm, Pending& pending) {
  for (auto& operation : pending.operations) {
    bool fails = gpu::fault("nccl-error"), hangs = gpu::fault("nccl-hang"), dies = gpu::fault("nccl-kill");
    gpu::count(operation.name.substr(0, operation.name.find(' ')));
    gpu::launch(pending.stream, operation.name, operation.ranges);
    if (fails) comm->state = REMOTE_ERROR, comm->error = "a peer was lost (emulated)";
    gpu::enqueue(pending.stream, [=] {
      if (comm->aborted) return true;
      if (fails || hangs) return false;
      if (!agree(comm, operation.name)) return comm->aborted.load();
      if (dies) kill(getpid(), SIGKILL);  // the others have seen this rank come
      return operation.run() || comm->aborted;
    });
  }
}

Result collective(Comm* comm, const std::string& name, size_t count, int type, void* stream,
                  std::vector<gpu::Range> ranges, std::function<bool()> run) {
  if (comm->aborted) return INVALID_ARGUMENT;
  if (comm->polls) return refuse(comm, INVALID_USAGE, name + " was called while an earlier call was in progress");
  comm->stream = gpu::made_stream(stream);
  Operation operation{name + " of " + std::to_string(count) + " numbers of type " + std::to_string(type), std::move(run),
                      std::move(ranges)};
  if (group_depth) {
    group[comm].stream = comm->stream;
    group[comm].operations.push_back(std::move(operation));
    return SUCCESS;
  }
  return begin(comm, {comm->stream, {std::move(operation)}});
}

std::string place_of(int device) {
  char host[64] = "";
  gethostname(host, sizeof host - 1);
  auto* id = getenv("NCCL_HOSTID");
  return std::string(id ? id : host) + " GPU " + std::to_string(gpu::physical(device));
}

Shared* map(const char* name, bool make) {
  int file = shm_open(name, O_RDWR | (make ? O_CREAT | O_EXCL : 0), 0600);
  if (file < 0) return nullptr;
  if (make && ftruncate(file, sizeof(Shared))) return nullptr;
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<Shared*>(memory);
}

void join(Comm* comm, Id id) {
  auto* shared = comm->shared = map(id.name, false);
  if (!shared) {
    comm->error = "the id names no group of this machine";
    comm->state = SYSTEM_ERROR;
    return;
  }
  auto place = place_of(comm->device);
  snprintf(shared->place[comm->rank], sizeof shared->place[0], "%s", place.c_str());
  ++shared->joined;
  if (!comm->barrier()) return;
  if (comm->rank == 0) shm_unlink(id.name);
  for (int rank = 0; rank < comm->size; rank++)
    if (rank != comm->rank && place == shared->place[rank]) {
      comm->error = "Duplicate GPU detected: ranks " + std::to_string(rank) + " and " + std::to_string(comm->rank);
      comm->state = INVALID_USAGE;
      return;
    }
  log(comm, "NET/Emulated : Using shared memory");
  log(comm, "Channel 00/0 : via SHM/emulated");
  std::ostringstream text;
  text << "ncclCommInitRankConfig comm " << comm << " rank " << comm->rank << " nranks " << comm->size << " cudaDev "
       << comm->device << " - Init COMPLETE";
  log(comm, text.str());
  comm->joining = false;
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) { return *version = 22809, SUCCESS; }

Result ncclGetUniqueId(Id* id) {
  static int n = 0;
  memset(id, 0, sizeof *id);
  snprintf(id->name, sizeof id->name, "/emulated-nccl-%d-%d", getpid(), n++);
  return map(id->name, true) ? SUCCESS : SYSTEM_ERROR;
}

struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

Result ncclCommInitRankConfig(Comm** made, int size, Id id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0) gpu::fail("NCCL was given a configuration that is not non-blocking");
  if (size > MOST_RANKS || rank < 0 || rank >= size) return INVALID_ARGUMENT;
  auto* comm = *made = new Comm;
  comm->rank = rank, comm->size = size, comm->device = gpu::current_device();
  comm->joining = true;
  comm->polls = POLLS;
  std::thread(join, comm, id).detach();
  return IN_PROGRESS;
}

Result ncclCommGetAsyncError(Comm* comm, Result* state) {
  std::lock_guard lock(comm->mutex);
  *state = static_cast<Result>(comm->state.load());
  if (*state != SUCCESS) return SUCCESS;
  static bool slow = gpu::fault_is_set("nccl-slow");
  if (comm->joining || (slow && comm->stream)) return *state = IN_PROGRESS, SUCCESS;
  if (comm->polls && --comm->polls) return *state = IN_PROGRESS, SUCCESS;
  for (auto& pending : comm->pending) put(comm, pending);
  comm->pending.clear();
  *state = static_cast<Result>(comm->state.load());
  return SUCCESS;
}

const char* ncclGetLastError(Comm* comm) { return comm->error.c_str(); }

const char* ncclGetErrorString(Result result) {
  switch (result) {
    case SUCCESS: return "no error";
    case SYSTEM_ERROR: return "unhandled system error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    case IN_PROGRESS: return "NCCL operation in progress";
  }
  return "unknown result";
}

Result ncclAllReduce(const void* from, void* to, size_t count, int type, int, Comm* comm, void* stream) {
  size_t bytes = count * size_of(type);
  return collective(comm, "ncclAllReduce", count, type, stream, {{from, bytes}, {to, bytes}},
                    [=] { return reduce(comm, from, to, count, type, -1); });
}

Result ncclReduce(const void* from, void* to, size_t count, int type, int, int root, Comm* comm, void* stream) {
  size_t bytes = count * size_of(type);
  return collective(comm, "ncclReduce", count, type, stream, {{from, bytes}, {to, bytes}},
                    [=] { return reduce(comm, from, to, count, type, root); });
}

Result ncclReduceScatter(const void* from, void* to, size_t count, int type, int, Comm* comm, void* stream) {
  size_t bytes = count * size_of(type);
  return collective(comm, "ncclReduceScatter", count, type, stream, {{from, bytes * comm->size}, {to, bytes}}, [=] {
    bool done = true;
    for (int rank = 0; rank < comm->size && done; rank++)
      done = reduce(comm, at(from, rank * bytes), to, count, type, rank);
    return done;
  });
}

Result ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
  size_t bytes = count * size_of(type);
  return collective(comm, "ncclBroadcast", count, type, stream, {{from, bytes}, {to, bytes}},
                    [=] { return broadcast(comm, from, to, bytes, root); });
}

Result ncclAllGather(const void* from, void* to, size_t count, int type, Comm* comm, void* stream) {
  size_t bytes = count * size_of(type);
  return collective(comm, "ncclAllGather", count, type, stream, {{from, bytes}, {to, bytes * comm->size}}, [=] {
    bool done = true;
    for (int rank = 0; rank < comm->size && done; rank++) done = broadcast(comm, from, at(to, rank * bytes), bytes, rank);
    return done;
  });
}

Result ncclGroupStart() { return ++group_depth, SUCCESS; }

Result ncclGroupEnd() {
  if (--group_depth) return SUCCESS;
  auto result = SUCCESS;
  for (auto& [comm, pending] : group) result = begin(comm, std::move(pending));
  group.clear();
  return result;
}

Result ncclCommFinalize(Comm* comm) {
  if (comm->polls) return refuse(comm, INVALID_USAGE, "finalised while a call was in progress");
  comm->polls = POLLS;
  return IN_PROGRESS;
}

// Neither gives the communicator back: its stream's thread may still name it.
Result ncclCommDestroy(Comm* comm) { return comm->aborted = true, SUCCESS; }

Result ncclCommAbort(Comm* comm) {
  if (gpu::fault_is_set("nccl-abort-hang"))
    while (true) pause();
  comm->aborted = true;
  if (comm->stream) gpu::release(comm->stream);
  return SUCCESS;
}

}  // extern "C"
