// torch.ops.oss on CUDA: checks, views of the tensors' memory, memory and streams from torch,
// registration. The contract is in csrc/dp_step.h, the work in step.h and the kernels beside it.
//
// The values of times and parents are not looked at: that would wait for the device.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "cuda/step.h"
#include "dp_step.h"
#include "views.h"

namespace oss::cuda {
namespace {

using torch::stable::new_empty;

void check_cuda(const Checker& check, cudaError_t status, const char* what) {
  if (status != cudaSuccess) check.error(what, ": ", cudaGetErrorString(status));
}

// torch's current stream. Asked of the libtorch that is loaded rather than linked, because this
// library is also loaded beside a torch without CUDA, which does not have the function.
cudaStream_t current_stream(const Checker& check, int device) {
  using Ask = int (*)(int32_t, void**);
  static const Ask ask = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const name =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Ask>(name);
  }();
  void* stream = nullptr;
  if (ask == nullptr || ask(device, &stream) != 0)
    check.error("torch does not tell its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// What the kernels' driver needs of a device, asked once.
Device describe(const Checker& check, int index) {
  static std::mutex mutex;
  static std::array<Device, 64> known{};
  if (index < 0 || index >= static_cast<int>(known.size())) check.error("device ", index);
  const std::lock_guard lock(mutex);
  Device& device = known[index];
  if (device.multiprocessors == 0) {
    int count = 0, major = 0, minor = 0;
    check_cuda(check, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index),
               "multiprocessors");
    check_cuda(check, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
               "compute capability");
    check_cuda(check, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
               "compute capability");
    if (major < 8)
      check.error("the CUDA kernels need compute capability 8.0 or later, this device has ", major,
                  ".", minor, "; backend='reference' serves it, slowly");
    device = {count};
  }
  return device;
}

// The device of a call: torch's memory and stream.
class Gpu {
 public:
  Gpu(const Checker& check, const Tensor& state)
      : check_(check),
        state_(state),
        index_(state.get_device_index()),
        guard_(index_),
        device_(describe(check, index_)),
        stream_(current_stream(check, index_)) {}

  const Device& device() const { return device_; }

  // Freed with this object: torch hands the memory out again in the order of the stream.
  void* allocate(int64_t bytes) {
    workspace_.push_back(make({bytes}, ScalarType::Byte));
    return workspace_.back().data_ptr();
  }

  Tensor make(const std::vector<int64_t>& sizes, std::optional<ScalarType> dtype = {}) {
    try {
      return new_empty(state_, sizes, dtype);
    } catch (const std::exception& error) {
      int64_t bytes = dtype.has_value() ? 8 : static_cast<int64_t>(state_.element_size());
      for (const int64_t size : sizes) bytes *= size;
      check_.error("could not allocate about ", bytes, " bytes of shape ", shape_text(sizes),
                   "; dp_accumulate_ works in place and takes the sources in chunks. ",
                   error.what());
    }
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Grid& grid, int threads, int64_t shared_bytes,
              const std::common_type_t<Args>& args) {
    if (grid.x < 1 || grid.y < 1 || grid.z < 1) return;
    if (shared_bytes > (48 << 10))
      check_cuda(check_,
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 "shared memory of a kernel");
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
    kernel<<<blocks, threads, shared_bytes, stream_>>>(args);
    check_cuda(check_, cudaGetLastError(), "launch of a kernel");
  }

 private:
  const Checker& check_;
  const Tensor& state_;
  const int index_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const Device device_;
  const cudaStream_t stream_;
  std::vector<Tensor> workspace_;
};

Problem make_problem(const Checker& check, const Tensor& state, const char* velocity_name,
                     const Tensor& velocity, const Tensor& teacher, const Tensor& times,
                     const std::optional<Tensor>& mask, int64_t first_source) {
  Problem p{};
  p.steps = state.size(0) - 1;
  p.samples = state.size(1);
  p.elements = state.numel() / (state.size(0) * state.size(1));
  if (p.steps > kMaxSteps)
    check.error("state must have at most N = ", kMaxSteps, " steps on CUDA, got N = ", p.steps);
  if (p.elements > kMaxElements)
    check.error("state must have at most ", kMaxElements, " elements per sample on CUDA, got ",
                p.elements);
  if (times.stride(0) != 1) check.error("times must be contiguous on CUDA");
  p.state = view_rows(check, "state", state);
  p.velocity = view_rows(check, velocity_name, velocity);
  p.teacher = view_rows(check, "teacher", teacher);
  p.times = times.const_data_ptr<double>();
  if (mask.has_value())
    p.mask = {mask->const_data_ptr<bool>(), mask->stride(0),
              mask->dim() == 2 ? mask->stride(1) : 0};
  p.first_source = first_source;
  p.begin_source = std::max<int64_t>(1, first_source);
  p.end_source = first_source + velocity.size(0);
  return p;
}

Numbers numbers_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Double, tensor.stride(0),
          tensor.stride(1)};
}

Parents parents_of(const Tensor& tensor) {
  return {static_cast<int64_t*>(tensor.data_ptr()), tensor.stride(0),
          tensor.size(1) == 1 ? 0 : tensor.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> dp_step(const Tensor& state, const Tensor& velocity,
                                           const Tensor& teacher, const Tensor& times,
                                           const std::optional<Tensor>& source_mask,
                                           const std::string& reduce) {
  const Checker check("dp_step", state);
  check.step(state, velocity, teacher, times, source_mask);
  Problem p = make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  p.reduce = check.reduction(reduce);

  Gpu gpu(check, state);
  const std::vector<int64_t> sizes(state.sizes().begin(), state.sizes().end());
  const bool wide = state.scalar_type() == ScalarType::Double;
  Tensor next = gpu.make(sizes);
  Tensor cost = gpu.make({p.steps + 1, p.samples}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor parent =
      gpu.make({p.steps + 1, p.reduce == Reduction::none ? p.samples : 1}, ScalarType::Long);
  step(gpu, p, numbers_of(cost), parents_of(parent), view_rows(check, "next_state", next), false);
  return {next, cost, parent};
}

Tensor dp_cost(const Tensor& state, const Tensor& velocity, const Tensor& teacher,
               const Tensor& times, const std::optional<Tensor>& source_mask) {
  const Checker check("dp_cost", state);
  check.step(state, velocity, teacher, times, source_mask);
  const Problem p =
      make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  Gpu gpu(check, state);
  Tensor out = gpu.make({p.steps + 1, p.steps + 1, p.samples}, ScalarType::Double);
  means(gpu, p, static_cast<double*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> dp_select(const Tensor& cost, const std::string& reduce) {
  const Checker check("dp_select", cost);
  check.costs(cost);
  const OfferedCosts costs{
      cost.const_data_ptr<double>(), cost.stride(0), cost.stride(1), cost.stride(2), cost.size(2),
      check.reduction(reduce)};
  Gpu gpu(check, cost);
  Tensor best = gpu.make({cost.size(0), cost.size(2)}, ScalarType::Double);
  Tensor parent = gpu.make({cost.size(0), costs.reduce == Reduction::none ? cost.size(2) : 1},
                           ScalarType::Long);
  select_costs(gpu, costs, cost.size(0), numbers_of(best), parents_of(parent));
  return {best, parent};
}

Tensor dp_advance(const Tensor& state, const Tensor& velocity, const Tensor& times,
                  const Tensor& parent) {
  const Checker check("dp_advance", state);
  check.advance(state, velocity, times, parent);
  const Problem p = make_problem(check, state, "velocity", velocity, state, times, {}, 0);
  Gpu gpu(check, state);
  Tensor next = gpu.make(std::vector<int64_t>(state.sizes().begin(), state.sizes().end()));
  const Tensor3 to = view_rows(check, "next_state", next);
  in_groups(p.samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
    advance(gpu, p, parents_of(parent), to, first, count, false);
  });
  return next;
}

void dp_accumulate_(const Tensor& state, const Tensor& velocity, int64_t first_source,
                    const Tensor& teacher, const Tensor& times, const Tensor& best_cost,
                    const Tensor& best_parent, const std::optional<Tensor>& source_mask,
                    const std::string& reduce) {
  const Checker check("dp_accumulate_", state);
  const Reduction reduction = check.accumulate(state, velocity, first_source, teacher, times,
                                               best_cost, best_parent, source_mask, reduce);
  Problem p = make_problem(check, state, "velocity_chunk", velocity, teacher, times, source_mask,
                           first_source);
  p.reduce = reduction;
  check_writable_state(check, state, p.state, velocity, teacher);
  Gpu gpu(check, state);
  step(gpu, p, numbers_of(best_cost), parents_of(best_parent), p.state, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(oss, CUDA, m) {
  m.impl("dp_step", TORCH_BOX(&dp_step));
  m.impl("dp_cost", TORCH_BOX(&dp_cost));
  m.impl("dp_select", TORCH_BOX(&dp_select));
  m.impl("dp_advance", TORCH_BOX(&dp_advance));
  m.impl("dp_accumulate_", TORCH_BOX(&dp_accumulate_));
}

}  // namespace oss::cuda
