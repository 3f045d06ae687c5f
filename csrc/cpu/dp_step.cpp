// torch.ops.oss on the CPU: checks, views of the tensors' memory, registration. The contract is in
// csrc/dp_step.h, the work in step.h and loops.h.

#include "dp_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <tuple>
#include <utility>

#include "cpu/capability.h"
#include "cpu/step.h"
#include "views.h"

namespace oss::cpu {
namespace {

using torch::stable::new_empty;

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

std::vector<double> read_times(const Checker& check, const Tensor& tensor) {
  const int64_t n = tensor.size(0), stride = tensor.stride(0);
  const double* data = tensor.const_data_ptr<double>();
  std::vector<double> times(n + kMaxTile, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    times[i] = data[i * stride];
    if (!std::isfinite(times[i]))
      check.error("times must be finite, got times[", i, "] = ", times[i]);
    if (i > 0 && !(times[i] > times[i - 1]))
      check.error("times must be strictly increasing, got times[", i - 1, "] = ", times[i - 1],
                  " and times[", i, "] = ", times[i]);
  }
  return times;
}

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

// The next state, uninitialised. First touching 4 KiB pages would take longer than writing them.
Tensor allocate_next(const Tensor& state) {
  Tensor next = new_empty(state, state.sizes());
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

Problem make_problem(const Checker& check, const Tensor& state, const char* velocity_name,
                     const Tensor& velocity, const Tensor& teacher, const Tensor& times,
                     const std::optional<Tensor>& mask, int64_t first_source) {
  Problem p{};
  p.last = state.size(0) - 1;
  p.samples = state.size(1);
  p.elements = state.numel() / (state.size(0) * state.size(1));
  p.state = view_rows(check, "state", state);
  p.velocity = view_rows(check, velocity_name, velocity);
  p.teacher = view_rows(check, "teacher", teacher);
  p.first_source = first_source;
  p.end_source = first_source + velocity.size(0);
  p.times = read_times(check, times);
  if (mask.has_value()) {
    const bool per_sample = mask->dim() == 2;
    const bool* live = mask->const_data_ptr<bool>();
    p.mask_samples = per_sample ? p.samples : 1;
    p.mask.resize((p.last + 1) * p.mask_samples);
    for (int64_t i = 0; i <= p.last; ++i)
      for (int64_t b = 0; b < p.mask_samples; ++b)
        p.mask[i * p.mask_samples + b] =
            live[i * mask->stride(0) + (per_sample ? b * mask->stride(1) : 0)];
  }
  return p;
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

Tensor3 samples_from(Tensor3 tensor, int64_t first) {
  tensor.rows.data += first * tensor.sample_stride;
  return tensor;
}

std::tuple<Tensor, Tensor, Tensor> dp_step(const Tensor& state, const Tensor& velocity,
                                           const Tensor& teacher, const Tensor& times,
                                           const std::optional<Tensor>& source_mask,
                                           const std::string& reduce) {
  const Checker check("dp_step", state);
  check.step(state, velocity, teacher, times, source_mask);
  Problem p = make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  p.reduce = check.reduction(reduce);

  Tensor next = allocate_next(state);
  const Tensor3 to = view_rows(check, "next_state", next);
  const bool wide = state.scalar_type() == ScalarType::Double;
  Tensor cost =
      new_empty(state, {p.last + 1, p.samples}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor parent =
      new_empty(state, {p.last + 1, p.reduce == Reduction::none ? p.samples : 1}, ScalarType::Long);
  for_samples(p, [&](const Problem& part, int64_t first) {
    Best best(part.last + 1, part.samples, part.reduce);
    step(part, kernels(), TorchPool(), best, samples_from(to, first), false);
    wide ? write_best<double>(best, cost, parent, first)
         : write_best<float>(best, cost, parent, first);
  });
  return {next, cost, parent};
}

Tensor dp_cost(const Tensor& state, const Tensor& velocity, const Tensor& teacher,
               const Tensor& times, const std::optional<Tensor>& source_mask) {
  const Checker check("dp_cost", state);
  check.step(state, velocity, teacher, times, source_mask);
  const Problem p =
      make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);

  const int64_t rows = p.last + 1;
  Tensor out = new_empty(state, {rows, rows, p.samples}, ScalarType::Double);
  double* data = static_cast<double*>(out.data_ptr());
  std::fill(data, data + rows * rows * p.samples, kInf);
  const TorchPool pool;
  Costs<TorchPool> costs(p, kernels(), pool);
  for (int64_t b = 0; b < p.samples; ++b) {
    const Live live(p, b);
    const double* cells = costs.of_sample(live, b);
    for (size_t l = 0; l < live.sources.size(); ++l) {
      const int64_t i = live.sources[l];
      for (int64_t j = 0; j < i; ++j)
        data[(i * rows + j) * p.samples + b] = cells[live.offsets[l] + j];
    }
  }
  return out;
}

std::tuple<Tensor, Tensor> dp_select(const Tensor& cost, const std::string& reduce) {
  const Checker check("dp_select", cost);
  check.costs(cost);
  const Best best = select(cost.const_data_ptr<double>(), cost.strides().data(), cost.size(0),
                           cost.size(2), check.reduction(reduce));
  Tensor best_cost = new_empty(cost, {best.targets(), best.samples}, ScalarType::Double);
  Tensor parent = new_empty(cost, {best.targets(), best.parent_samples}, ScalarType::Long);
  write_best<double>(best, best_cost, parent, 0);
  return {best_cost, parent};
}

Tensor dp_advance(const Tensor& state, const Tensor& velocity, const Tensor& times,
                  const Tensor& parent) {
  const Checker check("dp_advance", state);
  check.advance(state, velocity, times, parent);
  const Problem p = make_problem(check, state, "velocity", velocity, state, times, std::nullopt, 0);

  const Matrix<int64_t> given(parent);
  const int64_t columns = parent.size(1);
  std::vector<int64_t> parents;
  for (int64_t j = 0; j <= p.last; ++j)
    for (int64_t b = 0; b < columns; ++b) {
      parents.push_back(given(j, b));
      if (parents.back() != -1 && (parents.back() <= j || parents.back() > p.last))
        check.error("parent must be -1 or larger than its target and at most N = ", p.last,
                    ", got parent[", j, ", ", b, "] = ", parents.back());
    }
  Tensor next = allocate_next(state);
  const Tensor3 to = view_rows(check, "next_state", next);
  advance(p, kernels(), TorchPool(), parents.data(), columns, to, false, nullptr);
  return next;
}

void dp_accumulate_(const Tensor& state, const Tensor& velocity, int64_t first_source,
                    const Tensor& teacher, const Tensor& times, const Tensor& best_cost,
                    const Tensor& best_parent, const std::optional<Tensor>& source_mask,
                    const std::string& reduce) {
  const Checker check("dp_accumulate_", state);
  const Reduction reduction = check.accumulate(state, velocity, first_source, teacher, times,
                                               best_cost, best_parent, source_mask, reduce);
  const int64_t rows = state.size(0);
  Problem p = make_problem(check, state, "velocity_chunk", velocity, teacher, times, source_mask,
                           first_source);
  p.reduce = reduction;
  check_writable_state(check, state, p.state, velocity, teacher);

  const Matrix<double> cost(best_cost);
  const Matrix<int64_t> parent(best_parent);
  for (int64_t j = 0; j < rows; ++j) {
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
  for_samples(p, [&](const Problem& part, int64_t first) {
    Best best(rows, part.samples, reduction);
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t b = 0; b < best.samples; ++b)
        best.cost[j * best.samples + b] = cost(j, first + b);
      for (int64_t b = 0; b < best.parent_samples; ++b)
        best.parent[j * best.parent_samples + b] = parent(j, first + b);
    }
    step(part, kernels(), TorchPool(), best, part.state, true);
    write_best<double>(best, best_cost, best_parent, first);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(oss, CPU, m) {
  m.impl("dp_step", TORCH_BOX(&dp_step));
  m.impl("dp_cost", TORCH_BOX(&dp_cost));
  m.impl("dp_select", TORCH_BOX(&dp_select));
  m.impl("dp_advance", TORCH_BOX(&dp_advance));
  m.impl("dp_accumulate_", TORCH_BOX(&dp_accumulate_));
}

}  // namespace oss::cpu
