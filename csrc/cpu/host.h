// What the operators on the CPU share: torch's threads, small tensors, samples some at a time.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "cpu/step.h"
#include "dp_step.h"
#include "views.h"

namespace oss::cpu {

// torch's own threads.
struct TorchPool {
  int64_t threads() const { return torch::stable::get_num_threads(); }

  template <class Task>
  void run(int64_t count, const Task& task) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) task(worker);
    });
  }
};

// Small integer and cost tensors, [rows, columns].
template <class T>
class Matrix {
 public:
  explicit Matrix(const Tensor& tensor)
      : data_(static_cast<T*>(tensor.data_ptr())),
        row_(tensor.stride(0)),
        column_(tensor.stride(1)) {}
  T& operator()(int64_t i, int64_t j) const { return data_[i * row_ + j * column_]; }

 private:
  T* data_;
  int64_t row_, column_;
};

// Rows like the state's, uninitialised. First touching 4 KiB pages would take longer than writing
// them.
inline Tensor allocate_rows(const Checker& check, const Tensor& state, int64_t rows,
                            const char* advice) {
  std::vector<int64_t> sizes(state.sizes().begin(), state.sizes().end());
  sizes[0] = rows;
  Tensor next = allocate(check, state, sizes, {}, advice);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(next.data_ptr());
  const uintptr_t begin = (data + huge - 1) / huge * huge;
  const uintptr_t end = (data + next.numel() * next.element_size()) / huge * huge;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint
#endif
  return next;
}

// The sources that `mask` ([N+1] or [N+1, B]) says are live.
inline void read_mask(Problem& p, const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return;
  const bool per_sample = mask->dim() == 2;
  const bool* live = mask->const_data_ptr<bool>();
  p.mask_samples = per_sample ? p.samples : 1;
  p.mask.resize((p.last + 1) * p.mask_samples);
  for (int64_t i = 0; i <= p.last; ++i)
    for (int64_t b = 0; b < p.mask_samples; ++b)
      p.mask[i * p.mask_samples + b] =
          live[i * mask->stride(0) + (per_sample ? b * mask->stride(1) : 0)];
}

// Reads samples [first, first + best.samples) of a running best.
inline void read_best(Best& best, const Tensor& cost, const Tensor& parent, int64_t first) {
  const Matrix<double> costs(cost);
  const Matrix<int64_t> parents(parent);
  for (int64_t j = 0; j < best.targets(); ++j) {
    for (int64_t b = 0; b < best.samples; ++b)
      best.cost[j * best.samples + b] = costs(j, first + b);
    for (int64_t b = 0; b < best.parent_samples; ++b)
      best.parent[j * best.parent_samples + b] = parents(j, first + b);
  }
}

// Chunks of sources come in ascending order: what they have found so far is below first_source.
inline void check_best_parent(const Checker& check, const Tensor& best_parent,
                              int64_t first_source) {
  const Matrix<int64_t> parent(best_parent);
  for (int64_t j = 0; j < best_parent.size(0); ++j)
    for (int64_t b = 0; b < best_parent.size(1); ++b) {
      const int64_t i = parent(j, b);
      if (i >= first_source)
        check.error("chunks must come in ascending order of their sources: best_parent[", j, ", ",
                    b, "] = ", i, " is not below first_source = ", first_source);
      if (i != -1 && i <= j)
        check.error("best_parent must be -1 or larger than its target, got best_parent[", j, ", ",
                    b, "] = ", i);
    }
}

// Writes samples [first, first + best.samples) of a cost [N+1, B] and their parents.
template <class T>
void write_best(const Best& best, const Tensor& cost, const Tensor& parent, int64_t first) {
  const Matrix<T> costs(cost);
  const Matrix<int64_t> parents(parent);
  for (int64_t j = 0; j < best.targets(); ++j) {
    for (int64_t b = 0; b < best.samples; ++b)
      costs(j, first + b) = static_cast<T>(best.cost[j * best.samples + b]);
    for (int64_t b = 0; b < best.parent_samples; ++b)
      parents(j, first + b) = best.parent[j * best.parent_samples + b];
  }
}

// Runs body(part, first) over the samples: all of them where they share a parent, else some at a
// time.
template <class Body>
void for_samples(const Problem& p, const Body& body) {
  const int64_t at_once = p.reduce == Reduction::none ? kSamplesAtOnce : p.samples;
  for (int64_t first = 0; first < p.samples; first += at_once)
    body(p.samples_from(first, std::min(at_once, p.samples - first)), first);
}

inline Tensor3 samples_from(Tensor3 tensor, int64_t first) {
  tensor.rows.data += first * tensor.sample_stride;
  return tensor;
}

}  // namespace oss::cpu
