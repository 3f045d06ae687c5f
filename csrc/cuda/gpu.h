// The device of a call of an operator: memory and streams from torch, views of its tensors.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>
#include <type_traits>

#include "cuda/step.h"
#include "dp_step.h"
#include "views.h"

namespace oss::cuda {

inline void check_cuda(const Checker& check, cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or whoever asks next would be told of it again
  check.error(what, ": ", cudaGetErrorString(status));
}

// torch's current stream. Asked of the libtorch that is loaded rather than linked, because this
// library is also loaded beside a torch without CUDA, which does not have the function.
inline cudaStream_t current_stream(const Checker& check, int device) {
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
inline Device describe(const Checker& check, int index) {
  static std::mutex mutex;
  static std::array<Device, 64> known{};
  if (index < 0 || index >= static_cast<int>(known.size())) check.error("device ", index);
  const std::lock_guard lock(mutex);
  Device& device = known[index];
  if (device.multiprocessors == 0) {
    int count = 0, shared = 0, major = 0, minor = 0;
    check_cuda(check, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index),
               "multiprocessors");
    check_cuda(check,
               cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
               "shared memory of a block");
    check_cuda(check, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
               "compute capability");
    check_cuda(check, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
               "compute capability");
    if (major < 8)
      check.error("the CUDA kernels need compute capability 8.0 or later, this device has ", major,
                  ".", minor, "; the functions of oss_ext.ops serve it, slowly");
    device = {count, shared};
  }
  return device;
}

// The device of a call: torch's memory and stream.
class Gpu {
 public:
  // `advice`: what takes less memory than this operator.
  Gpu(const Checker& check, const Tensor& like, const char* advice)
      : check_(check),
        like_(like),
        advice_(advice),
        index_(like.get_device_index()),
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
    return oss::allocate(check_, like_, sizes, dtype, advice_);
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
  const Tensor& like_;
  const char* const advice_;
  const int index_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const Device device_;
  const cudaStream_t stream_;
  std::vector<Tensor> workspace_;
};

// What the kernels can hold.
inline void check_limits(const Checker& check, const char* name, int64_t steps, int64_t elements) {
  if (steps > kMaxSteps)
    check.error(name, " must have at most N = ", kMaxSteps, " steps on CUDA, got N = ", steps);
  if (elements > kMaxElements)
    check.error(name, " must have at most ", kMaxElements, " elements per sample on CUDA, got ",
                elements);
}

inline Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return {};
  return {mask->const_data_ptr<bool>(), mask->stride(0), mask->dim() == 2 ? mask->stride(1) : 0};
}

inline Numbers numbers_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Double, tensor.stride(0),
          tensor.stride(1)};
}

inline Parents parents_of(const Tensor& tensor) {
  return {static_cast<int64_t*>(tensor.data_ptr()), tensor.stride(0),
          tensor.size(1) == 1 ? 0 : tensor.stride(1)};
}

}  // namespace oss::cuda
