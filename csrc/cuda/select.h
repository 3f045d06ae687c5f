// Which source wins a target, from the sums of the cost pass or from given costs: ties to the
// largest source, then to the order that comes last, NaN and inf never, reductions over samples in
// index order.
#pragma once

#include "cuda/cost.h"

namespace oss::cuda {

// The mean of a pair from the sums of its splits.
struct SplitSums {
  const double* data;  // [samples of this launch, splits, cells]
  int64_t cells;
  int splits;
  int64_t elements;
  int64_t begin_source;

  OSS_DEVICE double mean(int64_t source, int64_t target, int64_t sample) const {
    const double* at = data + sample * splits * cells + cell_of(source, target, begin_source);
    const double sum = add_splits(splits, [&](int split) { return at[split * cells]; });
    return sum / static_cast<double>(elements);
  }
};

// What a sample adds to the objective. A source that is not finite in every sample does not count:
// inf stays.
OSS_DEVICE double objective_term(Reduction reduce, double cost) {
  if (!isfinite(cost)) return INFINITY;
  return reduce == Reduction::log_mean ? log(fmax(cost, 0x1p-126)) : cost;
}

// --- The objectives of all pairs, a group of samples at a time ---

struct CombineArgs {
  SplitSums sums;
  Mask mask;
  Reduction reduce;
  int64_t first_sample, samples;  // of this launch
  bool begin;                     // start from zero
  double* objective;              // [cells]
};

// Grid (blocks over targets, sources to compute).
OSS_KERNEL void __launch_bounds__(kSelectThreads) combine_kernel(const CombineArgs a) {
  const int64_t i = a.sums.begin_source + blockIdx.y;
  const int64_t j = int64_t{blockIdx.x} * kSelectThreads + threadIdx.x;
  if (j >= i) return;
  double* const at = a.objective + cell_of(i, j, a.sums.begin_source);
  double sum = a.begin ? 0 : *at;
  for (int64_t b = 0; b < a.samples; ++b) {
    const bool live = a.mask.live(i, a.first_sample + b);
    sum += live ? objective_term(a.reduce, a.sums.mean(i, j, b)) : INFINITY;
  }
  *at = sum;
}

// --- The argmin ---

// What is offered for a target: of one sample, from the sums of its splits.
struct OfferedBySample {
  SplitSums sums;
  Mask mask;
  int64_t first_sample;

  OSS_DEVICE double operator()(int64_t source, int64_t target, int64_t sample) const {
    if (!mask.live(source, sample)) return INFINITY;
    return sums.mean(source, target, sample - first_sample);
  }
};

// Of all samples together, from the objectives of the pairs.
struct OfferedTogether {
  const double* objective;
  int64_t begin_source, samples;

  OSS_DEVICE double operator()(int64_t source, int64_t target, int64_t) const {
    return objective[cell_of(source, target, begin_source)] / static_cast<double>(samples);
  }
};

// Of given costs [source, target, sample].
struct OfferedCosts {
  const double* cost;
  int64_t source_stride, target_stride, sample_stride, samples;
  Reduction reduce;

  OSS_DEVICE double operator()(int64_t source, int64_t target, int64_t sample) const {
    const double* at = cost + source * source_stride + target * target_stride;
    if (reduce == Reduction::none) return at[sample * sample_stride];
    double sum = 0;
    for (int64_t b = 0; b < samples; ++b) sum += objective_term(reduce, at[b * sample_stride]);
    return sum / static_cast<double>(samples);
  }
};

template <class Offered>
struct SelectArgs {
  Offered offered;
  int64_t begin_source, end_source;
  int64_t first_sample;  // of blockIdx.y == 0
  int64_t samples;       // all of them: with a reduction they share a parent
  Reduction reduce;
  bool more;      // the best so far is there already, from smaller sources and larger orders
  int64_t order;  // of the candidates
  Best best;      // costs are written here without a reduction only
};

// Block (target, sample).
template <class Offered>
OSS_KERNEL void __launch_bounds__(kSelectThreads) select_kernel(const SelectArgs<Offered> a) {
  double* const values = reinterpret_cast<double*>(dynamic_shared());
  int64_t* const sources = reinterpret_cast<int64_t*>(values + kSelectThreads);
  const int64_t j = blockIdx.x, sample = a.first_sample + blockIdx.y;
  const int me = threadIdx.x;

  double value = INFINITY;
  int64_t winner = -1;
  for (int64_t i = (j + 1 > a.begin_source ? j + 1 : a.begin_source) + me; i < a.end_source;
       i += kSelectThreads) {
    const double offered = a.offered(i, j, sample);
    if (!isfinite(offered) || !(offered <= value)) continue;
    value = offered;
    winner = i;
  }
  values[me] = value;
  sources[me] = winner;
  for (int n = kSelectThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (me >= n) continue;
    const double other = values[me + n];
    const bool tied = other == values[me] && sources[me + n] > sources[me];
    if (sources[me + n] < 0 || !(other < values[me] || tied)) continue;
    values[me] = other;
    sources[me] = sources[me + n];
  }
  if (me != 0) return;

  value = values[0];
  winner = sources[0];
  const bool reduced = a.reduce != Reduction::none;
  double best = INFINITY;  // what is to be reached
  const int64_t parent = a.more ? a.best.parents.at(j, sample) : -1;
  if (parent >= 0) {
    if (!reduced) {
      best = a.best.cost.get(j, sample);
    } else {
      best = 0;
      for (int64_t b = 0; b < a.samples; ++b)
        best += objective_term(a.reduce, a.best.cost.get(j, b));
      best /= static_cast<double>(a.samples);
    }
  }
  // Another order of this chunk may have a larger source already.
  const bool improved = winner >= 0 && (value < best || (value == best && winner >= parent));
  if (!improved && a.more) return;
  a.best.parents.at(j, sample) = winner;
  if (a.best.orders.data != nullptr) a.best.orders.at(j, sample) = winner < 0 ? -1 : a.order;
  if (!reduced) a.best.cost.set(j, sample, value);
  if (reduced && winner < 0)
    for (int64_t b = 0; b < a.samples; ++b) a.best.cost.set(j, b, INFINITY);
}

// --- Costs to hand out ---

// Grid (blocks over targets, sources 0 .. N, samples of this launch); out [N+1, N+1, B].
struct MeansArgs {
  SplitSums sums;
  Mask mask;
  int64_t first_sample, samples, rows;
  double* out;
};

OSS_KERNEL void __launch_bounds__(kSelectThreads) means_kernel(const MeansArgs a) {
  const int64_t i = blockIdx.y, j = int64_t{blockIdx.x} * kSelectThreads + threadIdx.x;
  const int64_t sample = a.first_sample + blockIdx.z;
  if (j >= a.rows) return;
  const bool live = j < i && a.mask.live(i, sample);
  a.out[(i * a.rows + j) * a.samples + sample] = live ? a.sums.mean(i, j, blockIdx.z) : INFINITY;
}

// Grid (samples, blocks over targets): the costs of the parents that were chosen.
struct PickArgs {
  OfferedCosts costs;
  Best best;
  int64_t rows;
};

OSS_KERNEL void __launch_bounds__(kSelectThreads) pick_kernel(const PickArgs a) {
  const int64_t j = int64_t{blockIdx.y} * kSelectThreads + threadIdx.x, b = blockIdx.x;
  if (j >= a.rows) return;
  const int64_t i = a.best.parents.at(j, b);
  const OfferedCosts& c = a.costs;
  const double own =
      c.cost[(i < 0 ? 0 : i) * c.source_stride + j * c.target_stride + b * c.sample_stride];
  a.best.cost.set(j, b, i < 0 ? INFINITY : own);
}

}  // namespace oss::cuda
