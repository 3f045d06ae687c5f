// The cost of one chosen pair per target and sample, with the additions of cost_kernel: after a
// reduction, whose winners are known only when the sums of the first samples are gone.
#pragma once

#include "cuda/cost.h"

namespace oss::cuda {

template <class Of>
struct PairCostArgs {
  CostArgs<Of> cost;
  Best best;  // the cost is written where a source and the order that were computed have won
  int warps;  // of a block: each takes every so many-th split
};

constexpr int kPairThreads = 512;
template <class T>
constexpr int kPairLoads = sizeof(T) == 4 ? 8 : 4;  // that a lane has under way together

// Shared memory: a double for each split, and the terms.
template <class Form>
constexpr int64_t pair_shared_bytes(int splits) {
  return splits * int64_t{sizeof(double)} +
         Form::terms * int64_t{sizeof(const char*) + sizeof(typename Form::T)};
}

// Block (target, sample).
template <class Form>
OSS_KERNEL void __launch_bounds__(kPairThreads, 1)
    pair_cost_kernel(const PairCostArgs<typename Form::Of> p) {
  using Z = typename Form::Z;
  using T = typename Form::T;
  constexpr int terms = Form::terms, count = kPairLoads<T>;
  constexpr int length = count / 2 * kChunk;
  static_assert(kFlushElements % length == 0);
  const auto& a = p.cost;
  double* const totals = reinterpret_cast<double*>(dynamic_shared());
  const int64_t j = blockIdx.x, sample = a.first_sample + blockIdx.z;
  const int64_t i = p.best.parents.at(j, sample);
  // None, or one of an earlier chunk, or of another order: the same for all threads.
  if (i < a.begin_source || p.best.order(j, sample) != a.of.order) return;
  // Shared, because registers have no index and loops over six terms of any type are long.
  const char** const rows = reinterpret_cast<const char**>(totals + a.splits);
  T* const coefficients = reinterpret_cast<T*>(rows + terms);
  if (threadIdx.x < terms) {
    const int r = threadIdx.x;
    const int64_t row = a.of.row(r, i, sample);
    rows[r] = row < 0 ? nullptr : row_of(a.of.tensor(r), row, sample);
    coefficients[r] = static_cast<T>(a.of.coefficient(r, i, j, sample));
  }
  __syncthreads();
  const char* const x = row_of(a.target, j, sample);
  const int lane = threadIdx.x % 32;
  const auto place = [&](int n) { return n / 2 * kChunk + 2 * lane + n % 2; };

  for (int split = threadIdx.x / 32; split < a.splits; split += p.warps) {
    const int begin = element_of(a.elements, split, a.splits);
    const int end = element_of(a.elements, split + 1, a.splits);
    const int last = end < a.elements ? end : a.elements;
    T sums[1] = {};
    double total = 0;
    for (int element = begin; element < end; element += length) {
      int at[count];
#pragma unroll
      for (int n = 0; n < count; ++n)
        at[n] = element + place(n) < last ? element + place(n) : last - 1;
      T candidates[count] = {};
#pragma unroll Form::euler ? terms : 1
      for (int r = 0; r < terms && rows[r] != nullptr; ++r) {
        T values[count];
        Form::load(a.of.tensor(r).rows, r, rows[r], at, values);
#pragma unroll
        for (int n = 0; n < count; ++n) {
          if (r > 0)
            candidates[n] = fma(coefficients[r], values[n], candidates[n]);
          else
            candidates[n] = Form::euler ? values[n] : multiply(coefficients[0], values[n]);
        }
      }
      T aims[count];
      load_elements<Z>(a.target.rows, x, at, aims);
#pragma unroll
      for (int n = 0; n < count; ++n) {
        const T difference = candidates[n] - aims[n];
        if (element + place(n) < last) sums[0] = fma(difference, difference, sums[0]);
      }
      if ((element - begin + length) % kFlushElements == 0 || element + length >= end) {
        add_lanes<1>(sums, lane);
        total += static_cast<double>(sums[0]);
        sums[0] = T(0);
      }
    }
    if (lane == 0) totals[split] = total;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double sum = add_splits(a.splits, [&](int split) { return totals[split]; });
  p.best.cost.set(j, sample, sum / static_cast<double>(a.elements));
}

}  // namespace oss::cuda
