// torch.ops.oss on the CPU: checks, views of the tensors' memory, registration. The contract is in
// csrc/dp_step.h, the work in step.h and loops.h.

#include "dp_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/step.h"
#include "views.h"

namespace oss::cpu {
namespace {

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

Problem make_problem(const Checker& check, const Tensor& state, const char* velocity_name,
                     const Tensor& velocity, const Tensor& teacher, const Tensor& times,
                     const std::optional<Tensor>& mask, int64_t first_source) {
  Problem p{};
  p.last = state.size(0) - 1;
  p.samples = state.size(1);
  p.elements = state.numel() / (state.size(0) * state.size(1));
  p.terms = 2;
  p.basis[0] = view_rows(check, "state", state);
  p.basis[1] = view_rows(check, velocity_name, velocity);
  p.target = view_rows(check, "teacher", teacher);
  p.first_source = first_source;
  p.end_source = first_source + velocity.size(0);
  p.times = read_times(check, times);
  read_mask(p, mask);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> dp_step(const Tensor& state, const Tensor& velocity,
                                           const Tensor& teacher, const Tensor& times,
                                           const std::optional<Tensor>& source_mask,
                                           StringHandle reduce) {
  const std::string how = take(reduce);
  const Checker check("dp_step", state);
  check.step(state, velocity, teacher, times, source_mask);
  Problem p = make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  p.reduce = check.reduction(how);

  Tensor next = allocate_rows(check, state, state.size(0), kInPlace);
  const Tensor3 to = view_rows(check, "next_state", next);
  const bool wide = state.scalar_type() == ScalarType::Double;
  Tensor cost = allocate(check, state, {p.last + 1, p.samples},
                         wide ? ScalarType::Double : ScalarType::Float, kInPlace);
  Tensor parent = allocate(check, state, {p.last + 1, p.reduce == Reduction::none ? p.samples : 1},
                           ScalarType::Long, kInPlace);
  for_samples(p, [&](const Problem& part, int64_t first) {
    Best best(part.last + 1, part.samples, part.reduce);
    const Tensor3 own = samples_from(to, first);
    step(part, kernels(), TorchPool(), best, &own, Absent::kept);
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
  Tensor out = allocate(check, state, {rows, rows, p.samples}, ScalarType::Double, kInPlace);
  double* data = static_cast<double*>(out.data_ptr());
  std::fill(data, data + rows * rows * p.samples, kInf);
  const TorchPool pool;
  Costs<TorchPool> costs(p, kernels(), pool);
  for (int64_t b = 0; b < p.samples; ++b) {
    Live live(p, b);
    for (const Run& run : live.runs) {
      const double* cells = costs.of_run(live, run, b);
      for (int64_t l = run.begin; l < run.end; ++l) {
        const Pair& pair = live.pairs[l];
        for (int64_t j = 0; j < pair.source; ++j)
          data[(pair.source * rows + j) * p.samples + b] = cells[pair.cells + j];
      }
    }
  }
  return out;
}

std::tuple<Tensor, Tensor> dp_select(const Tensor& cost, StringHandle reduce) {
  const std::string how = take(reduce);
  const Checker check("dp_select", cost);
  check.costs(cost);
  const Best best = select(cost.const_data_ptr<double>(), cost.strides().data(), cost.size(0),
                           cost.size(2), check.reduction(how));
  Tensor best_cost =
      allocate(check, cost, {best.targets(), best.samples}, ScalarType::Double, kNoPairs);
  Tensor parent =
      allocate(check, cost, {best.targets(), best.parent_samples}, ScalarType::Long, kNoPairs);
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
  Tensor next = allocate_rows(check, state, state.size(0), kInPlace);
  const Tensor3 to = view_rows(check, "next_state", next);
  advance(p, kernels(), TorchPool(), parents.data(), nullptr, columns, &to, Absent::kept, nullptr);
  return next;
}

void dp_accumulate_(const Tensor& state, const Tensor& velocity, int64_t first_source,
                    const Tensor& teacher, const Tensor& times, const Tensor& best_cost,
                    const Tensor& best_parent, const std::optional<Tensor>& source_mask,
                    StringHandle reduce) {
  const std::string how = take(reduce);
  const Checker check("dp_accumulate_", state);
  const Reduction reduction = check.accumulate(state, velocity, first_source, teacher, times,
                                               best_cost, best_parent, source_mask, how);
  const int64_t rows = state.size(0);
  Problem p = make_problem(check, state, "velocity_chunk", velocity, teacher, times, source_mask,
                           first_source);
  p.reduce = reduction;
  check_writable_state(check, state, p.basis[0], velocity, teacher);
  check_best_parent(check, best_parent, first_source);
  for_samples(p, [&](const Problem& part, int64_t first) {
    Best best(rows, part.samples, reduction);
    read_best(best, best_cost, best_parent, first);
    step(part, kernels(), TorchPool(), best, &part.basis[0], Absent::untouched);
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

const char* oss::cpu_capability() { return cpu::kernels().name; }
