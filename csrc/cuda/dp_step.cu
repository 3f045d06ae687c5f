// dp_step and its pieces on CUDA: checks, views of the tensors' memory, registration. The contract
// is in csrc/dp_step.h, the work in step.h and the kernels beside it.
//
// The values of times and parents are not looked at: that would wait for the device.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/gpu.h"

namespace oss::cuda {
namespace {

Problem<EulerSteps> make_problem(const Checker& check, const Tensor& state,
                                 const char* velocity_name, const Tensor& velocity,
                                 const Tensor& teacher, const Tensor& times,
                                 const std::optional<Tensor>& mask, int64_t first_source) {
  Problem<EulerSteps> p{};
  p.steps = state.size(0) - 1;
  p.samples = state.size(1);
  p.elements = state.numel() / (state.size(0) * state.size(1));
  check_limits(check, "state", p.steps, p.elements);
  p.of.state = view_rows(check, "state", state);
  p.of.velocity = view_rows(check, velocity_name, velocity);
  p.target = view_rows(check, "teacher", teacher);
  p.of.times = times.const_data_ptr<double>();
  p.of.times_stride = times.stride(0);
  p.mask = mask_of(mask);
  p.of.first_source = first_source;
  p.begin_source = std::max<int64_t>(1, first_source);
  p.end_source = first_source + velocity.size(0);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> dp_step(const Tensor& state, const Tensor& velocity,
                                           const Tensor& teacher, const Tensor& times,
                                           const std::optional<Tensor>& source_mask,
                                           StringHandle reduce) {
  const std::string how = take(reduce);
  const Checker check("dp_step", state);
  check.step(state, velocity, teacher, times, source_mask);
  Problem<EulerSteps> p =
      make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  p.reduce = check.reduction(how);

  Gpu gpu(check, state, kInPlace);
  const std::vector<int64_t> sizes(state.sizes().begin(), state.sizes().end());
  const bool wide = state.scalar_type() == ScalarType::Double;
  Tensor next = gpu.make(sizes);
  Tensor cost = gpu.make({p.steps + 1, p.samples}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor parent =
      gpu.make({p.steps + 1, p.reduce == Reduction::none ? p.samples : 1}, ScalarType::Long);
  step(gpu, p, {numbers_of(cost), parents_of(parent), {}}, view_rows(check, "next_state", next),
       false);
  return {next, cost, parent};
}

Tensor dp_cost(const Tensor& state, const Tensor& velocity, const Tensor& teacher,
               const Tensor& times, const std::optional<Tensor>& source_mask) {
  const Checker check("dp_cost", state);
  check.step(state, velocity, teacher, times, source_mask);
  const Problem<EulerSteps> p =
      make_problem(check, state, "velocity", velocity, teacher, times, source_mask, 0);
  Gpu gpu(check, state, kInPlace);
  Tensor out = gpu.make({p.steps + 1, p.steps + 1, p.samples}, ScalarType::Double);
  means(gpu, p, static_cast<double*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> dp_select(const Tensor& cost, StringHandle reduce) {
  const std::string how = take(reduce);
  const Checker check("dp_select", cost);
  check.costs(cost);
  const OfferedCosts costs{
      cost.const_data_ptr<double>(), cost.stride(0), cost.stride(1), cost.stride(2), cost.size(2),
      check.reduction(how)};
  Gpu gpu(check, cost, kNoPairs);
  Tensor best = gpu.make({cost.size(0), cost.size(2)}, ScalarType::Double);
  Tensor parent = gpu.make({cost.size(0), costs.reduce == Reduction::none ? cost.size(2) : 1},
                           ScalarType::Long);
  select_costs(gpu, costs, cost.size(0), {numbers_of(best), parents_of(parent), {}});
  return {best, parent};
}

Tensor dp_advance(const Tensor& state, const Tensor& velocity, const Tensor& times,
                  const Tensor& parent) {
  const Checker check("dp_advance", state);
  check.advance(state, velocity, times, parent);
  const Problem<EulerSteps> p =
      make_problem(check, state, "velocity", velocity, state, times, {}, 0);
  Gpu gpu(check, state, kInPlace);
  Tensor next = gpu.make(std::vector<int64_t>(state.sizes().begin(), state.sizes().end()));
  const Tensor3 to = view_rows(check, "next_state", next);
  in_groups(p.samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
    advance(gpu, p, parents_of(parent), to, first, count, false);
  });
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
  Problem<EulerSteps> p = make_problem(check, state, "velocity_chunk", velocity, teacher, times,
                                       source_mask, first_source);
  p.reduce = reduction;
  check_writable_state(check, state, p.of.state, velocity, teacher);
  Gpu gpu(check, state, kInPlace);
  step(gpu, p, {numbers_of(best_cost), parents_of(best_parent), {}}, p.of.state, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(oss, CUDA, m) {
  m.impl("dp_step", TORCH_BOX(&dp_step));
  m.impl("dp_cost", TORCH_BOX(&dp_cost));
  m.impl("dp_select", TORCH_BOX(&dp_select));
  m.impl("dp_advance", TORCH_BOX(&dp_advance));
  m.impl("dp_accumulate_", TORCH_BOX(&dp_accumulate_));
}

}  // namespace oss::cuda
