// The dynamic-programming step on rows in memory: how the work is cut and joined. No torch here, so
// that sanitizers and a plain C++ driver can run it; the loops themselves are in loops.h.
//
// A sample's elements are cut into segments, a function of the problem alone. A work item is one
// segment of some sources against all their targets and fills those cells of the segment's slab;
// the slabs are added in order. So the bits of a cost do not depend on how many threads there are
// or who computes what.
//
// Cells are the lower triangle: live source l has targets 0 .. live[l] - 1 at offsets[l].
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/select.h"

namespace oss::cpu {

struct Problem {
  int64_t last;  // N: targets 0 .. N-1, sources 1 .. N
  int64_t samples;
  int64_t elements;
  Tensor3 state, velocity, teacher;
  int64_t first_source;  // velocity holds sources first_source .. end_source - 1
  int64_t end_source;
  std::vector<double> times;        // [N+1], padded by kMaxTile
  std::vector<unsigned char> mask;  // [N+1, mask_samples], empty: all live
  int64_t mask_samples = 1;
  Reduction reduce = Reduction::none;

  // The same for samples [first, first + count).
  Problem samples_from(int64_t first, int64_t count) const {
    Problem part = *this;
    part.samples = count;
    for (Tensor3* tensor : {&part.state, &part.velocity, &part.teacher})
      tensor->rows.data += first * tensor->sample_stride;
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
constexpr int64_t kScratchBytes = int64_t{3} << 20;  // all workers together
constexpr int64_t kSamplesAtOnce = 256;  // without a reduction; bounds what is kept per sample
constexpr int64_t kMaxSegments = 16;
// Targets packed together stay in the second-level cache.
constexpr int64_t kMaxPanelRows = 204;
constexpr int64_t kMinPanelRows = 36;

inline Segments segments_of(const Problem& p) {
  const int64_t block = p.state.rows.dtype == DType::float64 ? kBlock<double> : kBlock<float>;
  const int64_t triangle_bytes = p.last * (p.last + 1) / 2 * static_cast<int64_t>(sizeof(double));
  const int64_t blocks = (p.elements + block - 1) / block;
  const int64_t fitting = std::max<int64_t>(1, kSlabBytes / triangle_bytes);
  return {p.elements, blocks, std::min({kMaxSegments, blocks, fitting})};
}

// Uninitialised memory, aligned for any vector.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), alignment))) {
  }
  ~Buffer() { ::operator delete(data_, alignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_;
};

// Runs item(index, worker) for every index. `Pool` has threads() and run(count, task(worker)); a
// task must not count on the others running beside it.
template <class Pool, class Item>
void for_each(const Pool& pool, int64_t count, int64_t workers, const Item& item) {
  std::atomic<int64_t> next{0};
  pool.run(std::min(count, workers), [&](int64_t worker) {
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      item(index, worker);
  });
}

// The live sources among those that the velocity holds: of one sample, or (sample < 0) live in all
// of them.
struct Live {
  std::vector<int64_t> sources, offsets;
  int64_t cells = 0;

  Live(const Problem& p, int64_t sample) {
    for (int64_t i = std::max<int64_t>(1, p.first_source); i < p.end_source; ++i) {
      bool live = true;
      for (int64_t b = 0; b < p.mask_samples && !p.mask.empty(); ++b)
        if (sample < 0 || p.mask_samples == 1 || b == sample)
          live &= p.mask[i * p.mask_samples + b] != 0;
      if (!live) continue;
      sources.push_back(i);
      offsets.push_back(cells);
      cells += i;
    }
  }
};

// Costs of all pairs of one sample after another, in the slabs' memory.
template <class Pool>
class Costs {
 public:
  Costs(const Problem& p, const Kernels& kernels, const Pool& pool)
      : p_(p),
        kernels_(kernels),
        pool_(pool),
        segments_(segments_of(p)),
        workers_(
            std::clamp<int64_t>(pool.threads(), 1, kScratchBytes / worker_bytes(kMinPanelRows))),
        scratch_bytes_(worker_bytes(panel_rows())),
        scratch_(workers_ * scratch_bytes_),
        slabs_(segments_.count * max_cells()) {}

  // Means of squared differences per cell, float64.
  double* of_sample(const Live& live, int64_t b) {
    const int64_t n = static_cast<int64_t>(live.sources.size());
    if (n == 0) return slabs_.get();
    CostJob job{p_.state.sample(b),  p_.velocity.sample(b), p_.teacher.sample(b),
                p_.first_source,     p_.times.data(),       segments_,
                live.sources.data(), live.offsets.data(),   slabs_.get(),
                live.cells};
    const std::vector<int64_t> cuts = cut_sources(live);
    const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
    for_each(pool_, parts * segments_.count, workers_, [&](int64_t index, int64_t worker) {
      const int64_t part = parts - 1 - index / segments_.count;
      char* scratch = scratch_.get() + worker * scratch_bytes_;
      kernels_.cost(job, index % segments_.count, cuts[part], cuts[part + 1], scratch,
                    scratch_bytes_);
    });
    for_cells(live.cells, [&](int64_t begin, int64_t end) { join(begin, end, live.cells); });
    return slabs_.get();
  }

  // Runs body(begin, end) over runs of cells.
  template <class Body>
  void for_cells(int64_t cells, const Body& body) {
    constexpr int64_t run = 4096;
    for_each(pool_, (cells + run - 1) / run, workers_, [&](int64_t index, int64_t) {
      body(index * run, std::min(cells, index * run + run));
    });
  }

 private:
  static int64_t worker_bytes(int64_t rows) { return (kScratchRows + rows) * kBlockBytes; }

  int64_t panel_rows() const {
    const int64_t affordable = kScratchBytes / workers_ / kBlockBytes - kScratchRows;
    return std::min({affordable, kMaxPanelRows, p_.last + kMaxTile});
  }

  int64_t max_cells() const {
    const int64_t first = std::max<int64_t>(1, p_.first_source), end = p_.end_source;
    return end <= first ? 0 : (end * (end - 1) - first * (first - 1)) / 2;
  }

  // Live sources in runs of about equal numbers of cells, enough of them to keep all workers busy.
  std::vector<int64_t> cut_sources(const Live& live) const {
    const int64_t n = static_cast<int64_t>(live.sources.size());
    const int64_t wanted =
        workers_ == 1 ? 1 : (2 * workers_ + segments_.count - 1) / segments_.count;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, n / kSourceGroup));
    std::vector<int64_t> cuts{0};
    for (int64_t l = 1; l < n; ++l)
      if (live.offsets[l] * parts >= live.cells * static_cast<int64_t>(cuts.size()))
        cuts.push_back(l);
    cuts.push_back(n);
    return cuts;
  }

  void join(int64_t begin, int64_t end, int64_t slab_size) {
    double* sum = slabs_.get();
    for (int64_t s = 1; s < segments_.count; ++s)
      for (int64_t c = begin; c < end; ++c) sum[c] += sum[s * slab_size + c];
    const double elements = static_cast<double>(p_.elements);
    for (int64_t c = begin; c < end; ++c) sum[c] /= elements;
  }

  const Problem& p_;
  const Kernels& kernels_;
  const Pool& pool_;
  const Segments segments_;
  const int64_t workers_;
  const int64_t scratch_bytes_;
  Buffer<char> scratch_;
  Buffer<double> slabs_;
};

// Writes the chosen candidates to `next`; where `cost` is given ([targets, samples]), also their
// own costs. In place, rows without a parent are left alone and targets ascend within each run of
// elements, which is safe because a target reads larger rows only.
template <class Pool>
void advance(const Problem& p, const Kernels& kernels, const Pool& pool, const int64_t* parent,
             int64_t parent_samples, const Tensor3& next, bool in_place, double* cost) {
  const int64_t targets = p.last + 1;
  const int64_t threads = std::max<int64_t>(1, pool.threads());
  Segments segments = segments_of(p);
  // Without costs any cut will do.
  if (cost == nullptr)
    segments.count = std::min(segments.blocks, (4 * threads + p.samples - 1) / p.samples);
  Buffer<double> sums(cost == nullptr ? 0 : segments.count * targets);
  std::vector<int64_t> parents(targets * parent_samples);  // of one sample after another
  for (int64_t b = 0; b < parent_samples; ++b)
    for (int64_t j = 0; j < targets; ++j) parents[b * targets + j] = parent[j * parent_samples + b];

  const auto run = [&](int64_t b, int64_t segment) {
    AdvanceJob job{p.state.sample(b),
                   p.velocity.sample(b),
                   p.teacher.sample(b),
                   next.sample(b),
                   in_place,
                   p.first_source,
                   p.times.data(),
                   segments,
                   targets,
                   parents.data() + (parent_samples == 1 ? 0 : b * targets),
                   sums.get()};
    if (cost == nullptr) job.teacher.data = nullptr;
    kernels.advance(job, segment);
  };
  if (cost == nullptr) {
    for_each(pool, p.samples * segments.count, threads,
             [&](int64_t index, int64_t) { run(index / segments.count, index % segments.count); });
    return;
  }
  for (int64_t b = 0; b < p.samples; ++b) {
    for_each(pool, segments.count, threads, [&](int64_t segment, int64_t) { run(b, segment); });
    for (int64_t j = 0; j < targets; ++j) {
      if (parents[(parent_samples == 1 ? 0 : b * targets) + j] < 0) continue;
      double sum = sums.get()[j];
      for (int64_t s = 1; s < segments.count; ++s) sum += sums.get()[s * targets + j];
      cost[j * p.samples + b] = sum / static_cast<double>(p.elements);
    }
  }
}

// One step over the sources that the velocity holds: improves `best` and writes the states of the
// targets that it improved (not in place: those without a parent get the state's row).
template <class Pool>
void step(const Problem& p, const Kernels& kernels, const Pool& pool, Best& best,
          const Tensor3& next, bool in_place) {
  Costs<Pool> costs(p, kernels, pool);
  const bool reduced = p.reduce != Reduction::none;
  const Live shared(p, -1);
  if (reduced) {
    Buffer<double> buffer(shared.cells);
    double* offered = buffer.get();
    std::fill(offered, offered + shared.cells, 0.0);
    for (int64_t b = 0; b < p.samples; ++b) {
      const double* cells = costs.of_sample(shared, b);
      costs.for_cells(shared.cells, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) offered[c] += objective_term(p.reduce, cells[c]);
      });
    }
    for (int64_t c = 0; c < shared.cells; ++c) offered[c] /= static_cast<double>(p.samples);
    std::vector<double> objective = best.objective(p.reduce, 0);
    for (size_t l = 0; l < shared.sources.size(); ++l)
      best.offer(shared.sources[l], offered + shared.offsets[l], objective, 0);
  }
  for (int64_t b = 0; !reduced && b < p.samples; ++b) {
    const Live own(p, b);
    const double* cells = costs.of_sample(own, b);
    std::vector<double> objective = best.objective(p.reduce, b);
    for (size_t l = 0; l < own.sources.size(); ++l)
      best.offer(own.sources[l], cells + own.offsets[l], objective, b);
    for (int64_t j = 0; j < best.targets(); ++j) best.cost[j * p.samples + b] = objective[j];
  }

  // Sources of earlier chunks are below first_source: those targets are as they should be.
  std::vector<int64_t> improved = best.parent;
  for (int64_t& parent : improved)
    if (parent < p.first_source) parent = -1;
  advance(p, kernels, pool, improved.data(), best.parent_samples, next, in_place,
          reduced ? best.cost.data() : nullptr);
}

}  // namespace oss::cpu
