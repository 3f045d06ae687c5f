// The dynamic-programming step on rows in memory: how the work is shared and joined. No torch here,
// so that sanitizers and a plain C++ driver can run it; the loops themselves are in loops.h.
//
// A work item is one segment of some pairs against all their targets and fills those cells of the
// segment's slab; the slabs are added in order. So the bits of a cost do not depend on how many
// threads there are or who computes what.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/problem.h"
#include "cpu/select.h"

namespace oss::cpu {

constexpr int64_t kScratchBytes = int64_t{3} << 20;  // all workers together
constexpr int64_t kSamplesAtOnce = 256;  // without a reduction; bounds what is kept per sample
// Targets packed together stay in the second-level cache.
constexpr int64_t kMaxPanelRows = 204;
constexpr int64_t kMinPanelRows = 36;
// Outputs from here on are written past the caches: a plain store first reads the line that it is
// to fill, and by the time that the last is written the first is no longer there.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

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

// Costs of the cells of one run of one sample after another, in the slabs' memory.
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
        slabs_(segments_.count * max_cells(p)),
        coefficients_(p.euler() ? 0 : max_coefficients() * compute_size(p)) {}

  // Means of squared differences per cell, float64.
  double* of_run(Live& live, const Run& run, int64_t b) {
    for (int64_t l = run.begin; l < run.end; ++l)
      for (int r = 0; r < live.pairs[l].terms; ++r)
        live.pairs[l].rows[r] = p_.row(r, live.pairs[l].source, b);
    CostJob job{};
    job.terms = p_.terms;
    for (int r = 0; r < p_.terms; ++r) job.basis[r] = p_.basis[r].sample(b);
    job.target = p_.target.sample(b);
    job.segments = segments_;
    job.pairs = live.pairs.data();
    job.slabs = slabs_.get();
    job.slab_size = run.cells;
    if (p_.euler()) {
      job.times = p_.times.data();
    } else {
      job.coefficients = coefficients_.get();
      for_each(pool_, run.end - run.begin, workers_, [&](int64_t index, int64_t) {
        const Pair& pair = live.pairs[run.begin + index];
        compute_size(p_) == sizeof(double) ? round<double>(pair, b) : round<float>(pair, b);
      });
    }
    const std::vector<int64_t> cuts = cut(live, run);
    const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
    for_each(pool_, parts * segments_.count, workers_, [&](int64_t index, int64_t worker) {
      const int64_t part = parts - 1 - index / segments_.count;
      char* scratch = scratch_.get() + worker * scratch_bytes_;
      kernels_.cost(job, index % segments_.count, cuts[part], cuts[part + 1], scratch,
                    scratch_bytes_);
    });
    for_cells(run.cells, [&](int64_t begin, int64_t end) { join(begin, end, run.cells); });
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

  int64_t max_coefficients() const {
    const int64_t pairs = (p_.end_source - p_.first_source) * p_.orders;
    return (max_cells(p_) + pairs * coefficients_of(Pair{})) * p_.terms;
  }

  // The coefficients of a pair in the compute type, targets beside each other.
  template <class T>
  void round(const Pair& pair, int64_t b) {
    T* to = reinterpret_cast<T*>(coefficients_.get()) + pair.coefficients;
    for (int r = 0; r < pair.terms; ++r) {
      const double* from = p_.coefficients(pair.order, r, pair.source, b);
      const int64_t stride = p_.affine.strides[3];
      for (int64_t j = 0; j < pair.source; ++j) *to++ = static_cast<T>(from[j * stride]);
      for (int64_t j = pair.source; j < coefficients_of(pair); ++j) *to++ = 0;
    }
  }

  // A run's pairs in parts of about equal numbers of cells, enough to keep all workers busy.
  std::vector<int64_t> cut(const Live& live, const Run& run) const {
    const int64_t wanted =
        workers_ == 1 ? 1 : (2 * workers_ + segments_.count - 1) / segments_.count;
    const int64_t most = std::max<int64_t>(1, (run.end - run.begin) / kSourceGroup);
    const int64_t parts = std::clamp<int64_t>(wanted, 1, most);
    std::vector<int64_t> cuts{run.begin};
    for (int64_t l = run.begin + 1; l < run.end; ++l)
      if (live.pairs[l].cells * parts >= run.cells * static_cast<int64_t>(cuts.size()))
        cuts.push_back(l);
    cuts.push_back(run.end);
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
  Buffer<char> coefficients_;
};

// The candidates that choose(b, rows, coefficients) names for the targets of sample b (see
// AdvanceJob): written to `next` where it is given, and where `cost` is given ([targets, samples]),
// also their costs. `next` may be the first basis if targets ascend within each run of elements,
// which they do: a target reads larger rows only.
template <class Pool, class Choose>
void advance(const Problem& p, int64_t targets, const Kernels& kernels, const Pool& pool,
             const Choose& choose, const Tensor3* next, Absent absent, double* cost) {
  const int64_t threads = std::max<int64_t>(1, pool.threads());
  AdvanceJob all{};
  all.terms = p.terms;
  all.absent = absent;
  all.targets = targets;
  all.streamed = p.samples * targets * p.elements * compute_size(p) >= kStreamBytes;
  // Without costs any cut will do.
  const int64_t count = std::min(blocks_of(p), (4 * threads + p.samples - 1) / p.samples);
  all.segments = cost == nullptr ? Segments{p.elements, blocks_of(p), count} : segments_of(p);
  Buffer<double> sums(cost == nullptr ? 0 : all.segments.count * targets);
  all.sums = sums.get();

  struct Chosen {
    std::vector<int64_t> rows;
    std::vector<double> coefficients;
  };
  const auto chosen_of = [&](int64_t b) {
    Chosen out{std::vector<int64_t>(targets * p.terms, -1),
               std::vector<double>(targets * p.terms, 0.0)};
    choose(b, out.rows.data(), out.coefficients.data());
    return out;
  };
  const auto run = [&](int64_t b, int64_t segment, const Chosen& chosen) {
    AdvanceJob job = all;
    for (int r = 0; r < p.terms; ++r) job.basis[r] = p.basis[r].sample(b);
    if (cost != nullptr) job.target = p.target.sample(b);
    if (next != nullptr) job.next = next->sample(b);
    job.rows = chosen.rows.data();
    job.coefficients = chosen.coefficients.data();
    kernels.advance(job, segment);
  };
  if (cost == nullptr) {
    for_each(pool, p.samples * count, threads, [&](int64_t index, int64_t) {
      run(index / count, index % count, chosen_of(index / count));
    });
    return;
  }
  for (int64_t b = 0; b < p.samples; ++b) {
    const Chosen chosen = chosen_of(b);
    for_each(pool, all.segments.count, threads,
             [&](int64_t segment, int64_t) { run(b, segment, chosen); });
    for (int64_t j = 0; j < targets; ++j) {
      if (chosen.rows[j * p.terms] < 0) continue;
      double sum = sums.get()[j];
      for (int64_t s = 1; s < all.segments.count; ++s) sum += sums.get()[s * targets + j];
      cost[j * p.samples + b] = sum / static_cast<double>(p.elements);
    }
  }
}

// Moves targets from their parents. Those of earlier chunks stay as they are: their sources are
// not here.
template <class Pool>
void advance(const Problem& p, const Kernels& kernels, const Pool& pool, const int64_t* parent,
             const int8_t* order, int64_t parent_samples, const Tensor3* next, Absent absent,
             double* cost) {
  const auto choose = [&](int64_t b, int64_t* rows, double* coefficients) {
    for (int64_t j = 0; j <= p.last; ++j) {
      const int64_t at = j * parent_samples + (parent_samples == 1 ? 0 : b);
      const int64_t i = parent[at];
      if (i < 0 || i < p.first_source) continue;
      const int o = order == nullptr ? 0 : order[at];
      for (int r = 0; r < p.terms_of[o]; ++r) {
        rows[j * p.terms + r] = p.row(r, i, b);
        coefficients[j * p.terms + r] = p.coefficient(o, r, i, j, b);
      }
    }
  };
  advance(p, p.last + 1, kernels, pool, choose, next, absent, cost);
}

// Improves `best` by the sources that there are. With a reduction, the costs are left to be
// computed for the winners.
template <class Pool>
void improve(const Problem& p, const Kernels& kernels, const Pool& pool, Best& best) {
  Costs<Pool> costs(p, kernels, pool);
  const bool reduced = p.reduce != Reduction::none;
  for (int64_t b = 0; b < best.parent_samples; ++b) {
    Live live(p, reduced ? -1 : b);
    std::vector<double> objective = best.objective(p.reduce, b);
    for (const Run& run : live.runs) {
      Buffer<double> buffer(reduced ? run.cells : 0);
      const double* offered = buffer.get();
      if (reduced) {
        double* mean = buffer.get();
        std::fill(mean, mean + run.cells, 0.0);
        for (int64_t k = 0; k < p.samples; ++k) {
          const double* cells = costs.of_run(live, run, k);
          costs.for_cells(run.cells, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) mean[c] += objective_term(p.reduce, cells[c]);
          });
        }
        for (int64_t c = 0; c < run.cells; ++c) mean[c] /= static_cast<double>(p.samples);
      } else {
        offered = costs.of_run(live, run, b);
      }
      for (int64_t l = run.begin; l < run.end; ++l) {
        const Pair& pair = live.pairs[l];
        best.offer(pair.source, pair.order, offered + pair.cells, objective, b);
      }
    }
    for (int64_t j = 0; !reduced && j < best.targets(); ++j)
      best.cost[j * p.samples + b] = objective[j];
  }
}

// One step over the sources that there are: improves `best` and writes the candidates of the
// targets that it improved, if `next` is given.
template <class Pool>
void step(const Problem& p, const Kernels& kernels, const Pool& pool, Best& best,
          const Tensor3* next, Absent absent) {
  improve(p, kernels, pool, best);
  double* cost = p.reduce == Reduction::none ? nullptr : best.cost.data();
  if (next != nullptr || cost != nullptr)
    advance(p, kernels, pool, best.parent.data(), best.order.data(), best.parent_samples, next,
            absent, cost);
}

}  // namespace oss::cpu
