// What the kernels of every device share: how they see a tensor [rows, samples, *dims] in memory,
// and the reductions. Plain data, no torch. (cpu/kernels.h says why nothing here may be called from
// the inner loops of the CPU.)
#pragma once

#include <cstdint>

namespace oss {

enum class DType { float32, float64, float16, bfloat16 };
enum class Reduction { none, mean, log_mean };

constexpr int kMaxDims = 8;

// One sample of a time-major tensor: row i starts at data + i * row_stride. The elements of a row,
// in logical order, are described by the merged dims; `dense` says that they are one contiguous
// run.
struct Rows {
  char* data;
  DType dtype;
  bool dense;
  int64_t row_stride;  // bytes
  int ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // bytes
};

// A time-major tensor [rows, samples, elements].
struct Tensor3 {
  Rows rows;  // of sample 0
  int64_t sample_stride;

  Rows sample(int64_t b) const {
    Rows out = rows;
    out.data += b * sample_stride;
    return out;
  }
};

}  // namespace oss
