// Which source, and which of its orders, wins a target: ties to the largest source, then to the
// lowest order, NaN and inf never, reductions over samples in index order.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tensors.h"

namespace oss::cpu {

constexpr double kInf = std::numeric_limits<double>::infinity();

// What a sample adds to the objective. A source that is not finite in every sample does not count:
// inf stays.
inline double objective_term(Reduction reduce, double cost) {
  if (!std::isfinite(cost)) return kInf;
  return reduce == Reduction::log_mean ? std::log(std::fmax(cost, 0x1p-126)) : cost;
}

// The best source of every target so far.
struct Best {
  int64_t samples, parent_samples;
  std::vector<double> cost;     // [targets, samples]: the winner's own, per sample
  std::vector<int64_t> parent;  // [targets, parent_samples], -1: none
  std::vector<int8_t> order;    // of the parent, likewise

  Best(int64_t targets, int64_t samples, Reduction reduce)
      : samples(samples),
        parent_samples(reduce == Reduction::none ? samples : 1),
        cost(targets * samples, kInf),
        parent(targets * parent_samples, -1),
        order(targets * parent_samples, -1) {}

  int64_t targets() const { return static_cast<int64_t>(cost.size()) / samples; }

  // What a new source has to reach, per target: of sample b, or of all of them.
  std::vector<double> objective(Reduction reduce, int64_t b) const {
    std::vector<double> out(targets(), kInf);
    for (int64_t j = 0; j < targets(); ++j) {
      if (parent[j * parent_samples + b] < 0) continue;
      out[j] = reduce == Reduction::none ? cost[j * samples + b] : 0;
      for (int64_t k = 0; reduce != Reduction::none && k < samples; ++k)
        out[j] += objective_term(reduce, cost[j * samples + k]);
      if (reduce != Reduction::none) out[j] /= static_cast<double>(samples);
    }
    return out;
  }

  // Sources come ascending, orders of one descending, so that the later one wins a tie.
  void offer(int64_t source, int64_t order, const double* offered, std::vector<double>& objective,
             int64_t b) {
    for (int64_t j = 0; j < source; ++j) {
      if (!(offered[j] <= objective[j]) || !std::isfinite(offered[j])) continue;
      objective[j] = offered[j];
      parent[j * parent_samples + b] = source;
      this->order[j * parent_samples + b] = static_cast<int8_t>(order);
    }
  }
};

// Picks from costs [source, target, sample] given with their strides.
inline Best select(const double* cost, const int64_t* strides, int64_t targets, int64_t samples,
                   Reduction reduce) {
  Best best(targets, samples, reduce);
  const auto at = [&](int64_t i, int64_t j, int64_t b) {
    return cost[i * strides[0] + j * strides[1] + b * strides[2]];
  };
  std::vector<double> offered(targets);
  for (int64_t b = 0; b < best.parent_samples; ++b) {
    std::vector<double> objective(targets, kInf);
    for (int64_t i = 1; i < targets; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        if (reduce == Reduction::none) {
          offered[j] = at(i, j, b);
          continue;
        }
        double sum = 0;
        for (int64_t k = 0; k < samples; ++k) sum += objective_term(reduce, at(i, j, k));
        offered[j] = sum / static_cast<double>(samples);
      }
      best.offer(i, 0, offered.data(), objective, b);
    }
  }
  for (int64_t j = 0; j < targets; ++j)
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t i = best.parent[j * best.parent_samples + (reduce == Reduction::none ? b : 0)];
      if (i >= 0) best.cost[j * samples + b] = at(i, j, b);
    }
  return best;
}

}  // namespace oss::cpu
