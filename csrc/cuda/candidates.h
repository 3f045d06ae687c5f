// What the candidates of a pair are, for kernels that are written once for all of them: Euler's
// step, or sums of up to six terms by index and coefficients.
//
// A form is what a kernel is compiled for: how many terms, stored how, and how a block of the cost
// pass is laid out. Its `Of` is the same at run time: where the terms are.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/platform.h"

namespace oss::cuda {

// --- Where the terms are ---

// Those of dp_step: state[i] + (t[j] - t[i]) * velocity[i].
struct EulerSteps {
  static constexpr int orders = 1;
  static constexpr int64_t order = 0, terms = 2;

  Tensor3 state, velocity;
  const double* times;
  int64_t times_stride;
  int64_t first_source;  // row 0 of velocity belongs to this source

  const EulerSteps& of_order(int) const { return *this; }

  OSS_EITHER const Tensor3& tensor(int r) const { return r == 0 ? state : velocity; }
  OSS_DEVICE int64_t row(int r, int64_t source, int64_t) const {
    return r == 0 ? source : source - first_source;
  }
  OSS_DEVICE double gap(int64_t source, int64_t target) const {
    return times[target * times_stride] - times[source * times_stride];
  }
  // Of the velocity: the state has none.
  OSS_DEVICE double coefficient(int, int64_t source, int64_t target, int64_t) const {
    return gap(source, target);
  }
};

// Rows of up to six tensors by index [terms, places, samples].
struct Basis {
  Tensor3 tensors[kMaxTerms];
  int64_t rows[kMaxTerms];
  int terms;
  const int64_t* index;
  int64_t strides[3];

  // -1: none there. So is what would be no row: nobody has looked at the values of the index.
  OSS_DEVICE int64_t row(int r, int64_t place, int64_t sample) const {
    if (r >= terms) return -1;
    const int64_t row = index[r * strides[0] + place * strides[1] + sample * strides[2]];
    return row < rows[r] ? row : -1;
  }
};

// Those of dp_argmin_, of one order at a time.
struct AffineTerms {
  Basis basis;
  int64_t first_source;  // place 0 of the index
  int orders;
  int terms_of[kMaxOrders];
  const double* coefficients;  // [orders, terms, sources, targets, samples]
  int64_t strides[5];
  int64_t order, terms;  // set by of_order

  AffineTerms of_order(int number) const {
    AffineTerms out = *this;
    out.order = number;
    out.terms = out.basis.terms = terms_of[number];
    out.coefficients += number * strides[0];
    // Nothing is read of the others, but their addresses are taken.
    for (int r = terms_of[number]; r < kMaxTerms; ++r) out.basis.tensors[r] = basis.tensors[0];
    return out;
  }

  OSS_EITHER const Tensor3& tensor(int r) const { return basis.tensors[r]; }
  OSS_DEVICE int64_t row(int r, int64_t source, int64_t sample) const {
    return basis.row(r, source - first_source, sample);
  }
  // 0 for terms that the order does not have, so that they change nothing.
  OSS_DEVICE double coefficient(int r, int64_t source, int64_t target, int64_t sample) const {
    if (r >= terms) return 0;
    return coefficients[r * strides[1] + (source - first_source) * strides[2] +
                        target * strides[3] + sample * strides[4]];
  }
};

// --- What the kernels are compiled for ---

// The type of state and target, and of velocity.
template <class Stored, class Beside>
struct Euler {
  using Of = EulerSteps;
  using Z = Stored;
  using V = Beside;
  using T = Compute<Z>;
  using Strided = Euler;  // what serves rows that are no aligned runs
  static constexpr bool euler = true;
  static constexpr int terms = 2, planes = 1;  // planes of coefficients

  template <int many>
  static OSS_DEVICE void load(const Rows& rows, int r, const char* row, const int (&at)[many],
                              T (&values)[many]) {
    r == 0 ? load_elements<Z>(rows, row, at, values) : load_elements<V>(rows, row, at, values);
  }
};

// As many terms, or less: those that are missing have rows and coefficients of zeros. The sum with
// them is the sum without.
template <class Stored, int count>
struct Affine {
  using Of = AffineTerms;
  using Z = Stored;
  using V = Stored;
  using T = Compute<Z>;
  using Strided = Affine<Z, kMaxTerms>;  // one for all, because compiling takes time
  static constexpr bool euler = false;
  static constexpr int terms = count, planes = count;

  template <int many>
  static OSS_DEVICE void load(const Rows& rows, int, const char* row, const int (&at)[many],
                              T (&values)[many]) {
    with_row_type<Z>(rows.dtype, [&](auto stored) {
      load_elements<decltype(stored)>(rows, row, at, values);
    });
  }
};

// Calls body(Z{}) with a stored type.
template <class Body>
void with_stored(DType dtype, const Body& body) {
  if (dtype == DType::float64) return body(double{});
  if (dtype == DType::float16) return body(Half{});
  if (dtype == DType::bfloat16) return body(BFloat16{});
  return body(float{});
}

// Calls body(form) with the form of some candidates.
template <class Body>
void with_form(const EulerSteps& of, const Body& body) {
  with_stored(of.state.rows.dtype, [&](auto z) {
    using Z = decltype(z);
    if constexpr (std::is_same_v<Z, float>) {
      const DType velocity = of.velocity.rows.dtype;
      if (velocity == DType::float16) return body(Euler<Z, Half>{});
      if (velocity == DType::bfloat16) return body(Euler<Z, BFloat16>{});
    }
    body(Euler<Z, Z>{});
  });
}

template <class Body>
void with_form(const AffineTerms& of, const Body& body) {
  with_stored(of.tensor(0).rows.dtype, [&](auto z) {
    using Z = decltype(z);
    if (of.terms <= 2) return body(Affine<Z, 2>{});
    if (of.terms == 3) return body(Affine<Z, 3>{});
    if (of.terms == 4) return body(Affine<Z, 4>{});
    body(Affine<Z, kMaxTerms>{});
  });
}

}  // namespace oss::cuda
