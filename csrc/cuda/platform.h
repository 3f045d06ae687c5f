// What the kernels need from the machine, behind one seam: nvcc's here, plain C++ in
// tests/cuda_on_host.h, so that the same kernels run where there is no GPU.
#pragma once

#include <type_traits>

#include "tensors.h"

namespace oss::cuda {
constexpr int kCopyBytes = 16;  // of copy_async
}

#if !defined(__CUDACC__)

#include "tests/cuda_on_host.h"

#else

#include <cuda_fp16.h>

// Each of several files that launch a kernel has its own.
#define OSS_KERNEL static __global__
#define OSS_DEVICE __device__ __forceinline__
#define OSS_EITHER __host__ __device__ __forceinline__  // on the host too

namespace oss::cuda {

// Shared memory of the size given at the launch, aligned for any vector.
OSS_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char oss_dynamic_shared[];
  return oss_dynamic_shared;
}

// Starts a copy of kCopyBytes, both addresses aligned to as many, from global to shared memory;
// what is beyond the first `valid` bytes becomes zero.
OSS_DEVICE void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
}
OSS_DEVICE void copy_async(void* to, const void* from, int valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid));
}

// Ends a group of copies; wait_copies<n> waits for all but this thread's last n groups.
OSS_DEVICE void end_copies() { asm volatile("cp.async.commit_group;"); }
template <int groups>
OSS_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// Bits that are tested one by one, which the compiler would keep in a register each.
OSS_DEVICE unsigned in_one_register(unsigned bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}

// Where the compiler would start loads for what comes later, and spill registers to hold them.
OSS_DEVICE void hold_loads() { __syncwarp(); }

// A product that is rounded before anything is added to it.
OSS_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
OSS_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }

OSS_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
OSS_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

}  // namespace oss::cuda

#endif

namespace oss::cuda {

// --- Storage types ---

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type to compute in, for a stored one.
template <class Z>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class Z>
using Compute = typename ComputeOf<Z>::Type;

OSS_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

OSS_DEVICE float widen(float value) { return value; }
OSS_DEVICE double widen(double value) { return value; }
OSS_DEVICE float widen(Half value) { return half_to_float(value.bits); }
OSS_DEVICE float widen(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

OSS_DEVICE void narrow(float value, float& to) { to = value; }
OSS_DEVICE void narrow(double value, double& to) { to = value; }
OSS_DEVICE void narrow(float value, Half& to) { to.bits = float_to_half(value); }
OSS_DEVICE void narrow(float value, BFloat16& to) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  to.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded);
}

// --- Several elements at once, from memory aligned for all of them ---

template <class Z, int count>
struct alignas(sizeof(Z) * count) Packed {
  Z values[count];
};

OSS_DEVICE float low_half(uint32_t two, BFloat16) { return bits_to_float(two << 16); }
OSS_DEVICE float high_half(uint32_t two, BFloat16) { return bits_to_float(two & 0xffff0000u); }
OSS_DEVICE float low_half(uint32_t two, Half) {
  return half_to_float(static_cast<uint16_t>(two & 0xffff));
}
OSS_DEVICE float high_half(uint32_t two, Half) {
  return half_to_float(static_cast<uint16_t>(two >> 16));
}

// Those that lie side by side, widened.
template <int count, class Z, class T>
OSS_DEVICE void load_packed(const Z* from, T* values) {
  if constexpr (sizeof(Z) == 2) {  // as words: of halves the compiler makes arrays in memory
    const auto words = *reinterpret_cast<const Packed<uint32_t, count / 2>*>(from);
#pragma unroll
    for (int n = 0; n < count; n += 2) {
      values[n] = low_half(words.values[n / 2], Z{});
      values[n + 1] = high_half(words.values[n / 2], Z{});
    }
  } else {
    const auto packed = *reinterpret_cast<const Packed<Z, count>*>(from);
#pragma unroll
    for (int n = 0; n < count; ++n) values[n] = packed.values[n];
  }
}

// --- Tensors ---

// Where element e of a row lies, in bytes from the row's first; any strides. A row has less than
// 2^31 elements, because a 64-bit division is a function call, which the registers do not survive.
OSS_DEVICE int64_t offset_of(const Rows& rows, unsigned e, int64_t size) {
  if (rows.dense) return e * size;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = rows.ndim - 1; d >= 0; --d) {
    const unsigned n = static_cast<unsigned>(rows.sizes[d]);
    offset += e % n * rows.strides[d];
    e /= n;
  }
  return offset;
}

OSS_DEVICE const char* row_of(const Tensor3& tensor, int64_t row, int64_t sample) {
  return tensor.rows.data + row * tensor.rows.row_stride + sample * tensor.sample_stride;
}

template <class Z>
OSS_DEVICE Z load_element(const Rows& rows, const char* row, int e) {
  return *reinterpret_cast<const Z*>(row + offset_of(rows, e, sizeof(Z)));
}

// Several elements of a row, whose loads are under way together.
template <class Z, int count, class T>
OSS_DEVICE void load_elements(const Rows& rows, const char* row, const int (&at)[count],
                              T (&values)[count]) {
  if (rows.dense) {
#pragma unroll
    for (int n = 0; n < count; ++n) values[n] = widen(reinterpret_cast<const Z*>(row)[at[n]]);
  } else {
#pragma unroll
    for (int n = 0; n < count; ++n) values[n] = widen(load_element<Z>(rows, row, at[n]));
  }
}

// Calls body(S{}) with the stored type of a row that may be 16-bit beside float32.
template <class Z, class Body>
OSS_DEVICE auto with_row_type(DType dtype, const Body& body) {
  if constexpr (sizeof(Z) == sizeof(float)) {
    if (dtype == DType::float16) return body(Half{});
    if (dtype == DType::bfloat16) return body(BFloat16{});
  }
  return body(Z{});
}

// An element of such a row.
template <class Z>
OSS_DEVICE Z load_beside(const Rows& rows, const char* row, int e) {
  return with_row_type<Z>(rows.dtype, [&](auto stored) -> Z {
    const auto value = load_element<decltype(stored)>(rows, row, e);
    if constexpr (std::is_same_v<decltype(stored), Z>)
      return value;
    else
      return widen(value);
  });
}

// Which sources are live; data is null where all are.
struct Mask {
  const bool* data;
  int64_t row_stride, sample_stride;

  OSS_DEVICE bool live(int64_t source, int64_t sample) const {
    return data == nullptr || data[source * row_stride + sample * sample_stride];
  }
};

// Double or float numbers, [rows, columns].
struct Numbers {
  void* data;
  bool wide;
  int64_t row_stride, column_stride;

  OSS_DEVICE double get(int64_t row, int64_t column) const {
    const int64_t at = row * row_stride + column * column_stride;
    return wide ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
  }
  OSS_DEVICE void set(int64_t row, int64_t column, double value) const {
    const int64_t at = row * row_stride + column * column_stride;
    if (wide)
      static_cast<double*>(data)[at] = value;
    else
      static_cast<float*>(data)[at] = static_cast<float>(value);
  }
};

struct Parents {
  int64_t* data;
  int64_t row_stride, column_stride;  // column_stride 0: one for all samples

  OSS_DEVICE int64_t& at(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// The best of every target so far.
struct Best {
  Numbers cost;  // [rows, samples]: the winner's own
  Parents parents;
  Parents orders;  // of the parents; data is null where there is one order

  OSS_DEVICE int64_t order(int64_t row, int64_t column) const {
    return orders.data == nullptr ? 0 : orders.at(row, column);
  }
};

}  // namespace oss::cuda
