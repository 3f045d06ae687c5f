// The contract of the native kernels of torch.ops.oss, and the argument checks that all devices
// share.
//
//   dp_step(state, velocity, teacher, times, *, source_mask=None, reduce="none") -> (next_state,
//   cost, parent) dp_cost(state, velocity, teacher, times, *, source_mask=None) -> [N+1, N+1, B]
//   float64, (source, target, sample) dp_select(cost, reduce="none") -> (best_cost, parent)
//   dp_advance(state, velocity, times, parent) -> next_state
//   dp_accumulate_(state!, velocity_chunk, first_source, teacher, times, best_cost!, best_parent!,
//   *,
//                  source_mask=None, reduce="none")
//
// state, velocity, teacher: [N+1, B, *dims], any strides. times: [N+1] float64, strictly
// increasing. For a source i and a target j < i,
//
//   candidate = state[i] + (t[j] - t[i]) * velocity[i],   cost = mean((candidate - teacher[j])^2)
//   per sample
//
// in float32 (float64 for float64 tensors); t[j] - t[i] is subtracted in float64 and rounded once;
// sums are float64 beyond a block of elements. parent[j] is the argmin over the live sources: ties
// go to the largest, NaN and inf never win, row 0 is never a source; without a winner parent is -1,
// cost inf and the state's row is kept. next_state[j] is the winner's candidate, rounded once. With
// a reduction ("mean", "log_mean": the mean of log(max(cost, 2^-126))) one parent serves the batch,
// and a source must be live and finite in every sample. velocity rows that are not live count
// for nothing, whatever they hold. See oss_ext/ops/reference.py for the definition.
//
// Checks need no synchronisation: shapes, dtypes, devices. Values (times increasing, parents in
// range) are checked where the tensors are in host memory.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensors.h"

namespace oss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// A string as the dispatcher hands it over, which is ours to delete: first of all, because what
// follows may throw. torch's own conversion leaves a copy behind in every call (2.11 to 2.13).
inline std::string take(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return std::string("dtype ") + torch::headeronly::toString(type);
  }
}

inline std::string text_of(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  const std::string index = std::to_string(device.index());
  if (device.is_cuda()) return "cuda:" + index;
  return "device " + index + " of type " + std::to_string(static_cast<int>(device.type()));
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t d = 0; d < sizes.size(); ++d) text << (d == 0 ? "" : ", ") << sizes[d];
  text << "]";
  return text.str();
}

// Checks of one call; messages begin with the operator's name.
class Checker {
 public:
  Checker(const char* op, const Tensor& device_of)
      : op_(op),
        device_(device_of.defined() ? device_of.device()
                                    : torch::stable::Device(torch::headeronly::DeviceType::CPU)) {}

  template <class... Args>
  [[noreturn]] void error(const Args&... args) const {
    fail(op_, ": ", args...);
  }

  // Python's None is an undefined tensor here.
  void defined(const char* name, const Tensor& tensor) const {
    if (!tensor.defined()) error(name, " must be a tensor, got none");
  }

  void device(const char* name, const Tensor& tensor) const {
    defined(name, tensor);
    if (tensor.device() == device_) return;
    error(name, " must be on ", text_of(device_), " like the other tensors, got ",
          text_of(tensor.device()));
  }

  void dtype(const char* name, const Tensor& tensor, ScalarType expected) const {
    defined(name, tensor);
    if (tensor.scalar_type() != expected)
      error(name, " must be ", name_of(expected), ", got ", name_of(tensor.scalar_type()));
  }

  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
             const char* text) const {
    bool same = tensor.dim() == static_cast<int64_t>(expected.size());
    for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == expected.begin()[d];
    if (same) return;
    const std::vector<int64_t> sizes(expected);
    error(name, " must have shape ", text, " = ", shape_text(sizes), ", got ",
          shape_text(tensor.sizes()));
  }

  // [N+1, B, *dims], N, B and the number of elements at least 1, floating.
  void state(const Tensor& tensor) const { rows("state", tensor, 2); }

  // [rows, B, *dims] with so many rows at least.
  void rows(const char* name, const Tensor& tensor, int64_t least) const {
    device(name, tensor);
    const ScalarType type = tensor.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && type != ScalarType::Half &&
        type != ScalarType::BFloat16)
      error(name, " must be float32, float64, float16 or bfloat16, got ", name_of(type));
    const std::string got = ", got shape " + shape_text(tensor.sizes());
    if (tensor.dim() < 2) error(name, " must have shape [rows, B, *dims]", got);
    if (tensor.size(0) < least) error(name, " must have at least ", least, " rows", got);
    if (tensor.size(1) < 1) error(name, " must have at least one sample (B >= 1)", got);
    if (tensor.numel() < 1) error(name, " must have at least one element per sample", got);
  }

  // Like `main`, but for the number of rows.
  void rows_like(const char* name, const Tensor& tensor, const char* main_name, const Tensor& main,
                 int64_t rows) const {
    device(name, tensor);
    bool same = tensor.dim() == main.dim() && tensor.size(0) == rows;
    for (int64_t d = 1; same && d < main.dim(); ++d) same = tensor.size(d) == main.size(d);
    if (same) return;
    std::vector<int64_t> expected(main.sizes().begin(), main.sizes().end());
    expected[0] = rows;
    error(name, " must have shape ", shape_text(expected), " to match ", main_name, ", got ",
          shape_text(tensor.sizes()));
  }

  // main's dtype, or 16-bit beside float32.
  void dtype_beside(const char* name, const Tensor& tensor, const char* main_name,
                    const Tensor& main) const {
    const ScalarType type = tensor.scalar_type(), expected = main.scalar_type();
    const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
    if (type == expected || (half && expected == ScalarType::Float)) return;
    error(name, " must have ", main_name, "'s dtype ", name_of(expected),
          expected == ScalarType::Float ? ", float16 or bfloat16" : "", ", got ", name_of(type));
  }

  void velocity(const char* name, const Tensor& tensor, const Tensor& state, int64_t rows) const {
    rows_like(name, tensor, "state", state, rows);
    dtype_beside(name, tensor, "state", state);
  }

  void teacher(const Tensor& tensor, const Tensor& state) const {
    rows_like("teacher", tensor, "state", state, state.size(0));
    dtype("teacher", tensor, state.scalar_type());
  }

  void times(const Tensor& tensor, const Tensor& state) const {
    device("times", tensor);
    dtype("times", tensor, ScalarType::Double);
    shape("times", tensor, {state.size(0)}, "[N+1]");
  }

  // [N+1] or [N+1, B], bool.
  void source_mask(const std::optional<Tensor>& mask, const Tensor& state) const {
    if (!mask.has_value()) return;
    device("source_mask", *mask);
    dtype("source_mask", *mask, ScalarType::Bool);
    if (mask->dim() == 2)
      shape("source_mask", *mask, {state.size(0), state.size(1)}, "[N+1] or [N+1, B]");
    else
      shape("source_mask", *mask, {state.size(0)}, "[N+1] or [N+1, B]");
  }

  // The arguments that dp_step and dp_cost share.
  void step(const Tensor& state, const Tensor& velocity, const Tensor& teacher, const Tensor& times,
            const std::optional<Tensor>& mask) const {
    this->state(state);
    this->velocity("velocity", velocity, state, state.size(0));
    this->teacher(teacher, state);
    this->times(times, state);
    source_mask(mask, state);
  }

  // Those of dp_advance.
  void advance(const Tensor& state, const Tensor& velocity, const Tensor& times,
               const Tensor& parent) const {
    this->state(state);
    this->velocity("velocity", velocity, state, state.size(0));
    this->times(times, state);
    this->parent(parent, state);
  }

  // Those of dp_accumulate_; gives the reduction.
  Reduction accumulate(const Tensor& state, const Tensor& velocity, int64_t first_source,
                       const Tensor& teacher, const Tensor& times, const Tensor& best_cost,
                       const Tensor& best_parent, const std::optional<Tensor>& mask,
                       const std::string& reduce) const {
    this->state(state);
    chunk(velocity, first_source, state);
    this->teacher(teacher, state);
    this->times(times, state);
    source_mask(mask, state);
    const Reduction reduced = reduction(reduce);
    best(best_cost, best_parent, state, reduced != Reduction::none);
    return reduced;
  }

  // The velocities of sources first_source ... of dp_accumulate_.
  void chunk(const Tensor& tensor, int64_t first_source, const Tensor& state) const {
    defined("velocity_chunk", tensor);
    if (tensor.dim() < 1 || tensor.size(0) < 1)
      error("velocity_chunk must hold at least one source, got shape ", shape_text(tensor.sizes()));
    const int64_t rows = state.size(0), sources = tensor.size(0);
    if (first_source < 1 || first_source + sources > rows)
      error("first_source must be in [1, N+1 - C] = [1, ", rows - sources, "], got ", first_source);
    velocity("velocity_chunk", tensor, state, sources);
  }

  // [N+1, N+1, B], float64.
  void costs(const Tensor& tensor) const {
    dtype("cost", tensor, ScalarType::Double);
    if (tensor.dim() != 3 || tensor.size(0) != tensor.size(1) || tensor.size(0) < 2 ||
        tensor.size(2) < 1)
      error("cost must have shape [N+1, N+1, B] with N, B >= 1, got ", shape_text(tensor.sizes()));
  }

  // [N+1, B], or [N+1, 1] for one parent per batch.
  void parent(const Tensor& tensor, const Tensor& state) const {
    device("parent", tensor);
    dtype("parent", tensor, ScalarType::Long);
    const bool shared = tensor.dim() == 2 && tensor.size(1) == 1;
    shape("parent", tensor, {state.size(0), shared ? 1 : state.size(1)}, "[N+1, B] or [N+1, 1]");
  }

  // The running best of dp_accumulate_: float64 and int64, written in place.
  void best(const Tensor& cost, const Tensor& parent, const Tensor& state, bool shared) const {
    device("best_cost", cost);
    device("best_parent", parent);
    dtype("best_cost", cost, ScalarType::Double);
    dtype("best_parent", parent, ScalarType::Long);
    shape("best_cost", cost, {state.size(0), state.size(1)}, "[N+1, B]");
    shape("best_parent", parent, {state.size(0), shared ? 1 : state.size(1)},
          shared ? "[N+1, 1]" : "[N+1, B]");
    for (const auto& [name, tensor] :
         {std::pair{"best_cost", &cost}, std::pair{"best_parent", &parent}})
      for (int64_t d = 0; d < 2; ++d)
        own_memory(name, *tensor, d);
  }

  void own_memory(const char* name, const Tensor& tensor, int64_t d) const {
    if (tensor.size(d) > 1 && tensor.stride(d) == 0)
      error(name, " is written in place: its elements must not share memory, got strides ",
            shape_text(tensor.strides()));
  }

  Reduction reduction(const std::string& name) const {
    if (name == "none") return Reduction::none;
    if (name == "mean") return Reduction::mean;
    if (name == "log_mean") return Reduction::log_mean;
    error("reduce must be 'none', 'mean' or 'log_mean', got '", name, "'");
  }

 private:
  const char* op_;
  const torch::stable::Device device_;
};

}  // namespace oss
