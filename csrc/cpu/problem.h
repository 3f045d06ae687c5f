// A problem in memory: what its candidates are, which of them are live, and how the work is cut. No
// torch here.
//
// A sample's elements are cut into segments, a function of N, D and the dtype alone, each with
// partial sums of its own. Cells are the lower triangle, once for every order: a pair (source,
// order) has targets 0 .. source-1. Pairs whose cells do not fit the slabs are taken in several
// runs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace oss::cpu {

// Candidates of any form, by index and coefficients in memory.
struct Affine {
  const int64_t* index;        // [terms, sources, samples]; -1: the source has no such term
  const double* coefficients;  // [orders, terms, sources, targets, samples]
  int64_t index_strides[3];
  int64_t strides[5];
};

struct Problem {
  int64_t last;  // N: targets 0 .. N-1, sources 1 .. N
  int64_t samples;
  int64_t elements;
  int terms;                 // the most that an order has
  Tensor3 basis[kMaxTerms];  // Euler's step: state, velocity
  Tensor3 target;
  int64_t first_source;  // there are sources first_source .. end_source - 1
  int64_t end_source;
  int orders = 1;
  int terms_of[kMaxOrders] = {2};
  std::vector<double> times;        // [N+1], padded by kMaxTile: Euler's step. Empty: affine
  Affine affine{};                  // of the sources that there are
  std::vector<unsigned char> mask;  // [N+1, mask_samples], empty: all live
  int64_t mask_samples = 1;
  Reduction reduce = Reduction::none;

  bool euler() const { return !times.empty(); }

  // The row of basis r that is a term of source i.
  int64_t row(int r, int64_t i, int64_t b) const {
    if (euler()) return r == 0 ? i : i - first_source;
    const int64_t* strides = affine.index_strides;
    return affine.index[r * strides[0] + (i - first_source) * strides[1] + b * strides[2]];
  }

  // The coefficients of targets 0, 1, ... are affine.strides[3] apart.
  const double* coefficients(int order, int r, int64_t i, int64_t b) const {
    const int64_t* strides = affine.strides;
    return affine.coefficients + order * strides[0] + r * strides[1] +
           (i - first_source) * strides[2] + b * strides[4];
  }

  double coefficient(int order, int r, int64_t i, int64_t j, int64_t b) const {
    if (euler()) return r == 0 ? 1 : times[j] - times[i];
    return coefficients(order, r, i, b)[j * affine.strides[3]];
  }

  // In every sample if b < 0.
  bool is_live(int64_t i, int64_t b) const {
    if (mask.empty()) return true;
    if (mask_samples == 1) b = 0;
    for (int64_t k = b < 0 ? 0 : b; k < (b < 0 ? mask_samples : b + 1); ++k)
      if (!mask[i * mask_samples + k]) return false;
    return true;
  }

  // Whether there is a candidate for any target, in every sample if b < 0.
  bool has(int order, int64_t i, int64_t b) const {
    if (euler()) return true;
    for (int64_t k = b < 0 ? 0 : b; k < (b < 0 ? samples : b + 1); ++k) {
      const double* first = coefficients(order, 0, i, k);
      int64_t j = 0;
      while (j < i && std::isnan(first[j * affine.strides[3]])) ++j;
      if (j == i) return false;
    }
    return true;
  }

  // The same for samples [first, first + count).
  Problem samples_from(int64_t first, int64_t count) const {
    Problem part = *this;
    part.samples = count;
    for (Tensor3& tensor : part.basis) tensor.rows.data += first * tensor.sample_stride;
    part.target.rows.data += first * target.sample_stride;
    part.affine.index += first * affine.index_strides[2];
    part.affine.coefficients += first * affine.strides[4];
    if (mask_samples == 1) return part;
    part.mask_samples = count;
    part.mask.clear();
    for (int64_t i = 0; i <= last; ++i)
      part.mask.insert(part.mask.end(), mask.begin() + i * mask_samples + first,
                       mask.begin() + i * mask_samples + first + count);
    return part;
  }
};

constexpr int64_t kSlabBytes = int64_t{17} << 20;    // all slabs together, N <= 1024
constexpr int64_t kMaxSegments = 16;

inline int64_t triangle_of(const Problem& p) { return p.last * (p.last + 1) / 2; }

// Bytes of an element in the compute type.
inline int64_t compute_size(const Problem& p) {
  return p.basis[0].rows.dtype == DType::float64 ? sizeof(double) : sizeof(float);
}

inline int64_t blocks_of(const Problem& p) {
  const int64_t block = kBlockBytes / compute_size(p);
  return (p.elements + block - 1) / block;
}

// Alike for any number of orders and terms, and so are the bits of a cost.
inline Segments segments_of(const Problem& p) {
  const int64_t triangle_bytes = triangle_of(p) * static_cast<int64_t>(sizeof(double));
  const int64_t fitting = std::max<int64_t>(1, kSlabBytes / triangle_bytes);
  return {p.elements, blocks_of(p), std::min({kMaxSegments, blocks_of(p), fitting})};
}

// What a run may hold. Coefficients take memory beside the slabs, so that there is less for those.
inline int64_t max_cells(const Problem& p) {
  const int64_t first = std::max<int64_t>(1, p.first_source), end = p.end_source;
  const int64_t all = end <= first ? 0 : (end * (end - 1) - first * (first - 1)) / 2 * p.orders;
  return p.euler() ? all : std::min(all, std::max(p.last, triangle_of(p) / 2));
}

// Pairs that are computed together, in the slabs' memory.
struct Run {
  int64_t begin, end, cells, coefficients;
};

// The live pairs: of one sample, or (sample < 0) live in all of them.
struct Live {
  std::vector<Pair> pairs;
  std::vector<Run> runs;

  Live(const Problem& p, int64_t sample) {
    const int64_t most = max_cells(p);
    for (int64_t i = std::max<int64_t>(1, p.first_source); i < p.end_source; ++i) {
      if (!p.is_live(i, sample)) continue;
      for (int order = p.orders - 1; order >= 0; --order) {
        if (!p.has(order, i, sample)) continue;
        const int64_t at = static_cast<int64_t>(pairs.size());
        if (runs.empty() || runs.back().cells + i > most) runs.push_back({at, at, 0, 0});
        Run& run = runs.back();
        pairs.push_back({i, order, p.terms_of[order], {}, run.cells, run.coefficients});
        run.end = at + 1;
        run.cells += i;
        run.coefficients += p.terms_of[order] * coefficients_of(pairs.back());
      }
    }
  }
};

}  // namespace oss::cpu
