// Tensors as the kernels of every device see them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "dp_step.h"
#include "tensors.h"

namespace oss {

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: return DType::float32;
  }
}

// [rows, samples, *dims] with the dims merged where memory allows.
inline Tensor3 view_rows(const Checker& check, const char* name, const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  Tensor3 out{};
  Rows& rows = out.rows;
  rows.data = static_cast<char*>(tensor.data_ptr());
  rows.dtype = dtype_of(tensor);
  rows.row_stride = tensor.stride(0) * size;
  out.sample_stride = tensor.stride(1) * size;
  for (int64_t d = 2; d < tensor.dim(); ++d) {
    const int64_t n = tensor.size(d), stride = tensor.stride(d) * size;
    if (n == 1) continue;
    if (rows.ndim > 0 && rows.strides[rows.ndim - 1] == n * stride) {
      rows.sizes[rows.ndim - 1] *= n;
      rows.strides[rows.ndim - 1] = stride;
      continue;
    }
    if (rows.ndim == kMaxDims)
      check.error(name, " has more than ", kMaxDims,
                  " dims that are not contiguous; call .contiguous()");
    rows.sizes[rows.ndim] = n;
    rows.strides[rows.ndim++] = stride;
  }
  if (rows.ndim == 0) {
    rows.sizes[0] = 1;
    rows.strides[0] = size;
    rows.ndim = 1;
  }
  rows.dense = rows.ndim == 1 && rows.strides[0] == size;
  return out;
}

// What takes less memory than an operator.
constexpr const char* kInPlace = "dp_accumulate_ works in place and takes the sources in chunks";
constexpr const char* kNoPairs = "dp_accumulate_ needs no costs of all pairs";
constexpr const char* kFewerSources = "chunks of fewer sources take less";
constexpr const char* kFewerTargets = "fewer targets at a time take less";

// An uninitialised tensor on the device of `like`, of its dtype where none is given.
inline Tensor allocate(const Checker& check, const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype, const char* advice) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception&) {  // it names a line of torch's headers; torch prints the reason
    int64_t bytes = !dtype.has_value()            ? static_cast<int64_t>(like.element_size())
                    : *dtype == ScalarType::Byte  ? 1
                    : *dtype == ScalarType::Float ? 4
                                                  : 8;
    for (const int64_t size : sizes) bytes *= size;
    check.error("could not allocate ", bytes, " bytes of shape ", shape_text(sizes), " on ",
                text_of(like.device()), "; ", advice);
  }
}

// The first and last byte of a tensor's elements.
inline std::pair<const char*, const char*> span_of(const Tensor& tensor) {
  const char* first = static_cast<const char*>(tensor.data_ptr());
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return {first, first + extent * static_cast<int64_t>(tensor.element_size())};
}

inline void check_writable_state(const Checker& check, const Tensor& state, const Tensor3& rows,
                                 const Tensor& velocity, const Tensor& teacher) {
  const int64_t row_bytes = rows.rows.dense ? state.numel() / state.size(0) / state.size(1) *
                                                  static_cast<int64_t>(state.element_size())
                                            : 0;
  const int64_t n = state.size(0), samples = state.size(1);
  const int64_t by_row = rows.rows.row_stride, by_sample = rows.sample_stride;
  const bool samples_inside =
      (samples == 1 || by_sample >= row_bytes) && by_row >= (samples - 1) * by_sample + row_bytes;
  const bool rows_inside =
      by_row >= row_bytes && (samples == 1 || by_sample >= (n - 1) * by_row + row_bytes);
  if (!rows.rows.dense || !(samples_inside || rows_inside))
    check.error(
        "state is written in place: the elements of each [row, sample] must be contiguous and "
        "rows must not overlap, got shape ",
        shape_text(state.sizes()), " with strides ", shape_text(state.strides()));
  const auto [begin, end] = span_of(state);
  for (const auto& [name, other] :
       {std::pair{"velocity_chunk", &velocity}, std::pair{"teacher", &teacher}}) {
    const auto [other_begin, other_end] = span_of(*other);
    if (begin < other_end && other_begin < end)
      check.error("state is written in place and must not share memory with ", name);
  }
}

}  // namespace oss
