// An emulated libtorch_cuda.so: LibTorch's CUDA device on the CPU, with the host's memory.
//
// NVIDIA's library of this name registers its kernels for the dispatch key CUDA. In a process without it the key is free,
// and one kernel for all operators takes it. That kernel passes the same memory to the CPU's kernel, as a CPU tensor.

#include "gpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using at::Tensor;

gpu::Stream* stream(DeviceIndex device) { return gpu::default_stream(device); }

// ---- Memory ----

struct Allocator final : c10::DeviceAllocator {
  struct Block {
    size_t size;
    DeviceIndex device;
  };
  std::mutex mutex;
  std::map<void*, Block> blocks;
  std::map<DeviceIndex, c10::CachingDeviceAllocator::DeviceStats> stats;

  c10::DataPtr allocate(size_t n) override;
  void give_back(void* memory);
  static void deleter(void* memory);
  c10::DeleterFnPtr raw_deleter() const override { return &deleter; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard lock(mutex);
    return stats[device];
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard lock(mutex);
    stats[device].allocated_bytes[0].reset_peak();
  }
};

// Never destroyed: tensors in static variables give their memory back when the process ends.
Allocator& allocator = *new Allocator;

c10::DataPtr Allocator::allocate(size_t n) {
  auto device = static_cast<DeviceIndex>(gpu::current_device());
  Device place(c10::kCUDA, device);
  if (!n) return {nullptr, place};
  gpu::count("allocations");
  if (gpu::fault("oom"))
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", n >> 20, " MiB. GPU ", int(device),
                     " has a total capacity of 16.00 GiB of which 0 bytes is free.");
  // Rounds like CUDA's allocator.
  auto size = (n + 511) / 512 * 512;
  void* memory = std::aligned_alloc(512, size);
  TORCH_CHECK(memory, "the emulated GPU has no ", size, " bytes");
  memset(memory, 0xff, size);  // NaN, so that nothing can rely on fresh memory being zero
  std::lock_guard lock(mutex);
  blocks[memory] = {size, device};
  stats[device].allocated_bytes[0].increase(size);
  gpu::allocated({memory, size});
  return {memory, memory, &deleter, place};
}

void Allocator::give_back(void* memory) {
  Block block;
  {
    std::lock_guard lock(mutex);
    block = blocks.at(memory);
    blocks.erase(memory);
    stats[block.device].allocated_bytes[0].decrease(block.size);
  }
  gpu::freed(stream(block.device), {memory, block.size});
  free(memory);
}

void Allocator::deleter(void* memory) { allocator.give_back(memory); }

struct Pinned final : c10::Allocator {
  std::mutex mutex;
  std::map<const void*, size_t> blocks;
  c10::DataPtr allocate(size_t n) override;
  static void deleter(void* memory);
  c10::DeleterFnPtr raw_deleter() const override { return &deleter; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
  bool holds(const void* memory) {
    std::lock_guard lock(mutex);
    auto place = blocks.upper_bound(memory);
    if (place == blocks.begin()) return false;
    --place;
    return memory < static_cast<const char*>(place->first) + place->second;
  }
};

Pinned& pinned = *new Pinned;

c10::DataPtr Pinned::allocate(size_t n) {
  void* memory = std::aligned_alloc(64, (n + 63) / 64 * 64 + 64);
  std::lock_guard lock(mutex);
  blocks[memory] = n;
  return {memory, memory, &deleter, Device(c10::kCPU)};
}

void Pinned::deleter(void* memory) {
  std::lock_guard lock(pinned.mutex);
  pinned.blocks.erase(memory);
  free(memory);
}

// ---- The device ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return {c10::kCUDA, static_cast<DeviceIndex>(gpu::current_device())}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < gpu::device_count(), "CUDA error: invalid device ordinal");
    if (device.index() >= 0) gpu::current_device() = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override { gpu::current_device() = device.index(); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return c10::Stream(c10::Stream::DEFAULT, stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(gpu::device_count()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

struct EmulatedHooks final : at::CUDAHooksInterface {
  explicit EmulatedHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return gpu::device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return gpu::device_count(); }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(gpu::device_count()); }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(gpu::current_device()); }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  void deviceSynchronize(DeviceIndex) const override { gpu::synchronize(); }
  bool isPinnedPtr(const void* memory) const override { return pinned.holds(memory); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  long versionCUDART() const override { return 13000; }
  // LibTorch seeds it, but nothing draws from it: the CPU's kernels draw from the CPU's, so dropout is the CPU's.
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static auto generator = at::detail::createCPUGenerator();
    return generator;
  }
};
namespace at {
using Hooks = ::EmulatedHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}  // namespace at

namespace {

// ---- Operators ----

gpu::Range range(const Tensor& tensor) {
  if (!tensor.numel()) return {nullptr, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); d++) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {tensor.const_data_ptr(), static_cast<size_t>(last + 1) * tensor.element_size()};
}

Tensor device_empty(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType type) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}

// A device's memory as a CPU tensor.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

// Whether NVIDIA's library has a kernel for an operator; operators.txt is beside this library.
bool has_kernel(const std::string& name) {
  static const auto names = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&has_kernel), &info);
    std::string path = info.dli_fname;
    std::ifstream file(path.substr(0, path.rfind('/') + 1) + "operators.txt");
    std::set<std::string> names;
    for (std::string line; std::getline(file, line);) names.insert(line);
    if (names.size() < 1000) gpu::fail("operators.txt is not beside %s, or not whole", path.c_str());
    return names;
  }();
  return names.count(name) > 0;
}

// Refuses what LibTorch refuses under deterministic algorithms, by its documentation of
// torch.use_deterministic_algorithms, except for the gradients of image operators.
void check_determinism(const std::string& name, const std::vector<IValue>& arguments) {
  auto& context = at::globalContext();
  if (!context.deterministicAlgorithms()) return;
  static const std::set<std::string> unordered = {
      "aten::put_", "aten::histc", "aten::histc.out", "aten::bincount", "aten::median.dim_values", "aten::nanmedian.dim_values",
      "aten::kthvalue.values", "aten::nll_loss2d_forward", "aten::nll_loss2d_forward.output", "aten::_embedding_bag"};
  bool floating = !arguments.empty() && arguments[0].isTensor() && arguments[0].toTensor().is_floating_point();
  if (unordered.count(name) || (name.rfind("aten::cumsum", 0) == 0 && floating)) context.alertNotDeterministic(name);
  static const std::set<std::string> products = {"aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm.out", "aten::bmm",
                                                 "aten::bmm.out", "aten::baddbmm", "aten::baddbmm.out", "aten::addmv.out"};
  if (!products.count(name)) return;
  auto* configured = getenv("CUBLAS_WORKSPACE_CONFIG");
  TORCH_CHECK(configured && (!strcmp(configured, ":4096:8") || !strcmp(configured, ":16:8")),
              "Deterministic behavior was enabled, but ", name, " is not deterministic because it uses CuBLAS; set "
              "CUBLAS_WORKSPACE_CONFIG=:4096:8 before it is loaded");
}

// The bytes of a tensor's elements; those of an expanded one are fewer than it has elements.
int64_t size(const Tensor& tensor) {
  return static_cast<int64_t>(std::min<size_t>(range(tensor).length, tensor.numel() * tensor.element_size()));
}


bool begins(const std::string& name, const char* with) { return name.rfind(with, 0) == 0; }

// Runs one of the device's operators with the CPU's kernel.
struct Call {
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op(op), stack(stack), name(c10::toString(op.operator_name())) {}
  const c10::OperatorHandle& op;
  torch::jit::Stack* stack;
  std::string name;
  DeviceIndex device = -1;
  std::vector<gpu::Range> touched;
  std::vector<std::pair<Tensor, Tensor>> written;  // (the device's, the host's)
  std::vector<int64_t> reads, writes;              // bytes

  Tensor argument(const Tensor& tensor, const c10::Argument& what) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      // A scalar may come from the CPU, and so may indices of an assignment. LibTorch refuses anything else.
      TORCH_CHECK(tensor.dim() == 0 || name.find("index") != std::string::npos,
                  "Expected all tensors to be on the same device, but ", name, " was given one on the CPU");
      return tensor;
    }
    TORCH_CHECK(device < 0 || device == tensor.device().index(), "Expected all tensors to be on the same device, but ", name,
                " was given ones on two GPUs");
    device = tensor.device().index();
    touched.push_back(range(tensor));
    bool changes = what.alias_info() && what.alias_info()->isWrite();
    if (!what.is_out()) reads.push_back(size(tensor));
    if (changes) writes.push_back(size(tensor));
    // An empty result is one that will be resized.
    auto host = changes && !tensor.numel() ? at::empty({0}, tensor.options().device(at::kCPU)) : on_host(tensor);
    if (changes) written.emplace_back(tensor, host);
    return host;
  }

  Tensor result(const Tensor& host) {
    if (!host.defined()) return host;
    for (auto& [mine, its] : written)
      if (its.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return mine;
    auto mine = device_empty(host.sizes(), host.strides(), host.scalar_type());
    on_host(mine).copy_(host);
    gpu::touch(stream(device), name, range(mine));
    writes.push_back(size(mine));
    return mine;
  }

  // Bytes that a GPU moves for this operator, each operand once.
  int64_t bytes() {
    // Of their first tensor these touch as much as their result, or what they add to it, has.
    if (begins(name, "aten::gather") || begins(name, "aten::index_select")) reads[0] = writes.at(0);
    if (begins(name, "aten::scatter_add") || begins(name, "aten::index_add")) reads[0] = writes.at(0) = reads.back();
    if (begins(name, "aten::zero_") || begins(name, "aten::fill_")) reads.clear();
    int64_t sum = 0;
    for (auto* all : {&reads, &writes})
      for (auto n : *all) sum += n;
    return sum;
  }

  void run() {
    if (!has_kernel(name)) gpu::fail("LibTorch has no CUDA kernel for %s, or the emulation lacks it", name.c_str());
    auto& schema = op.schema();
    size_t n = schema.arguments().size(), begin = stack->size() - n;
    check_determinism(name, {stack->begin() + begin, stack->end()});
    for (size_t i = 0; i < n; i++) {
      IValue& value = (*stack)[begin + i];
      auto& what = schema.arguments()[i];
      if (value.isTensor()) {
        value = argument(value.toTensor(), what);
      } else if (value.isTensorList()) {
        std::vector<Tensor> list;
        for (auto& tensor : value.toTensorVector()) list.push_back(argument(tensor, what));
        value = list;
      } else if (value.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (std::optional<Tensor> tensor : value.toOptionalTensorList())
          list.push_back(tensor ? std::optional(argument(*tensor, what)) : tensor);
        value = list;
      } else if (value.isDevice()) {
        value = Device(at::kCPU);
      }
    }
    if (device < 0) device = static_cast<DeviceIndex>(gpu::current_device());
    gpu::current_device() = device;
    gpu::launch(stream(device), name, touched);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    for (auto& [mine, host] : written) {
      if (mine.sizes() == host.sizes()) continue;
      auto grown = result(host.clone());
      mine.unsafeGetTensorImpl()->set_sizes_and_strides(grown.sizes(), grown.strides());
      mine.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
    }
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
      IValue& value = (*stack)[i];
      if (value.isTensor()) {
        value = result(value.toTensor());
      } else if (value.isTensorList()) {
        std::vector<Tensor> list;
        for (auto& tensor : value.toTensorVector()) list.push_back(result(tensor));
        value = list;
      }
    }
    gpu::count_launch(name, bytes());
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type.value_or(at::kFloat),
                                   format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return device_empty(size, stride, type.value_or(at::kFloat));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  auto device = (self.is_cuda() ? self : source).device().index();
  if (!self.is_cuda()) {
    if (non_blocking && self.is_pinned()) gpu::fail("a copy to the host that does not wait: the emulation has none");
    gpu::read(stream(device), "a copy to the host", range(source));
    return on_host(self).copy_(on_host(source)), self;
  }
  std::vector<gpu::Range> touched;
  for (const Tensor& tensor : {std::cref<Tensor>(self), std::cref(source)})
    if (tensor.is_cuda()) touched.push_back(range(tensor));
  gpu::launch(stream(device), "aten::copy_", touched);
  // A batch is the first that comes from pinned memory.
  if (non_blocking && source.is_pinned()) gpu::count_launches = true;
  bool moves = self.is_cuda() && source.is_cuda();
  gpu::count_launch(moves ? "aten::copy_" : "a copy to the device", size(self) + (moves ? size(source) : 0));
  on_host(self).copy_(on_host(source));
  if (!source.is_cuda() && !(non_blocking && source.is_pinned())) gpu::wait_for(stream(device));
  return self;
}

at::Scalar item(const Tensor& tensor) {
  gpu::read(stream(tensor.device().index()), "aten::_local_scalar_dense", range(tensor));
  return on_host(tensor).item();
}

// Runs `work` with the CPU's tensors of `inputs`, as the operator `name`, and returns its results on the device. It moves so
// many bytes besides them.
std::vector<Tensor> run(const char* name, const std::vector<Tensor>& inputs, int64_t bytes,
                        const std::function<std::vector<Tensor>(const std::vector<Tensor>&)>& work) {
  auto device = inputs[0].device().index();
  std::vector<gpu::Range> touched;
  std::vector<Tensor> hosts, results;
  for (auto& input : inputs) touched.push_back(range(input)), hosts.push_back(on_host(input)), bytes += size(input);
  gpu::current_device() = device;
  gpu::launch(stream(device), name, touched);
  for (auto& host : work(hosts)) {
    auto mine = device_empty(host.sizes(), host.strides(), host.scalar_type());
    on_host(mine).copy_(host);
    gpu::touch(stream(device), name, range(mine));
    results.push_back(mine), bytes += size(mine);
  }
  gpu::count_launch(name, bytes);
  return results;
}

// The CPU has no product of bf16 matrices that is added to fp32 ones.
Tensor& addmm_dtype_out(const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType type, const at::Scalar& beta,
                        const at::Scalar& alpha, Tensor& out) {
  TORCH_CHECK(self.is_same(out) && type == at::kFloat && a.scalar_type() == at::kBFloat16, "the emulation adds in place only");
  check_determinism("aten::addmm.out", {});
  run("aten::addmm.dtype_out", {self, a, b}, size(out), [&](auto& in) -> std::vector<Tensor> {
    Tensor sum = in[0];
    sum.addmm_(in[1].to(type), in[2].to(type), beta, alpha);
    return {};
  });
  return out;
}

// Computes attention in one operator if the CPU can, as a GPU would in bf16, else with plain mathematics. Counts which kernel
// a Hopper GPU would have chosen.
int64_t choose_attention(const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>&, double dropout,
                         bool, std::optional<double>, bool) {
  auto& context = at::globalContext();
  bool half = query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf;
  bool cudnn = half && context.userEnabledCuDNNSDP() && !context.deterministicAlgorithms() && query.size(3) % 8 == 0;
  gpu::count(cudnn ? "attention_cudnn" : half ? "attention_flash" : "attention_efficient");
  if (cudnn && dropout * 16 != static_cast<int>(dropout * 16)) gpu::fail("cuDNN's attention rounds a dropout of %g", dropout);
  return static_cast<int64_t>(half && dropout == 0 ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

using Flash = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Flash flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, double, bool causal, bool, std::optional<double> scale) {
  auto done = run("attention", {q, k, v}, 0, [&](auto& in) -> std::vector<Tensor> {
    auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(in[0], in[1], in[2], 0.0, causal, {}, scale);
    return {out, sums};
  });
  auto none = at::empty({0}, at::kLong);
  return {done[0], done[1], Tensor(), Tensor(), q.size(2), k.size(2), none, none, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                            const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&,
                                                            c10::SymInt, c10::SymInt, double, bool causal, const Tensor&,
                                                            const Tensor&, std::optional<double> scale) {
  auto done = run("attention, backward", {grad, q, k, v, out, sums}, 0, [&](auto& in) -> std::vector<Tensor> {
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(in[0], in[1], in[2], in[3], in[4], in[5], 0.0,
                                                                                 causal, {}, scale);
    return {dq, dk, dv};
  });
  return {done[0], done[1], done[2]};
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", item);
  // LibTorch would compute these on a device of its own kind by other operators.
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  library.impl("addmm.dtype_out", addmm_dtype_out);
  library.impl("_scaled_dot_product_flash_attention", flash_attention);
  library.impl("_scaled_dot_product_flash_attention_backward", flash_attention_backward);
}

struct Registered {
  Registered() {
    c10::SetAllocator(c10::kCUDA, &allocator);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  }
} registered;

}  // namespace
