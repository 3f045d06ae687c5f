// dp_argmin_ and dp_combine on CUDA. The contract is in csrc/dp_argmin.h, the work in step.h and
// the kernels beside it, which do dp_step too.
//
// The values of indices, coefficients and parents are not looked at: that would wait for the
// device.

#include "dp_argmin.h"

#include <torch/csrc/stable/library.h>

#include "cuda/gpu.h"

namespace oss::cuda {
namespace {

static_assert(kBasisLimit == kMaxTerms && kOrderLimit == kMaxOrders);

Basis make_basis(const AffineChecker& check, const std::vector<Tensor>& tensors,
                 const Tensor& index) {
  Basis out{};
  out.terms = static_cast<int>(tensors.size());
  for (int r = 0; r < out.terms; ++r) {
    out.tensors[r] = view_rows(check, ("basis[" + std::to_string(r) + "]").c_str(), tensors[r]);
    out.rows[r] = tensors[r].size(0);
  }
  out.index = index.const_data_ptr<int64_t>();
  for (int d = 0; d < 3; ++d) out.strides[d] = index.stride(d);
  return out;
}

int64_t elements_of(const Tensor& tensor) {
  return tensor.numel() / (tensor.size(0) * tensor.size(1));
}

void dp_argmin_(const std::vector<Tensor>& basis, const Tensor& index, const Tensor& coefficients,
                const std::vector<int64_t>& terms, int64_t first_source, const Tensor& target,
                const Tensor& best_cost, const Tensor& best_parent, const Tensor& best_order,
                const std::optional<Tensor>& source_mask, StringHandle reduce) {
  const std::string how = take(reduce);
  const AffineChecker check("dp_argmin_", index);
  Problem<AffineTerms> p{};
  p.reduce = check.argmin(basis, index, coefficients, terms, first_source, target, best_cost,
                          best_parent, best_order, source_mask, how);
  p.steps = target.size(0) - 1;
  p.samples = target.size(1);
  p.elements = elements_of(target);
  check_limits(check, "target", p.steps, p.elements);
  p.target = view_rows(check, "target", target);
  p.mask = mask_of(source_mask);
  p.begin_source = first_source;
  p.end_source = first_source + index.size(1);
  p.of.basis = make_basis(check, basis, index);
  p.of.first_source = first_source;
  p.of.orders = static_cast<int>(terms.size());
  for (int o = 0; o < p.of.orders; ++o) p.of.terms_of[o] = static_cast<int>(terms[o]);
  p.of.coefficients = coefficients.const_data_ptr<double>();
  for (int d = 0; d < 5; ++d) p.of.strides[d] = coefficients.stride(d);
  if (coefficients.size(4) == 1) p.of.strides[4] = 0;

  Gpu gpu(check, target, kFewerSources);
  improve(gpu, p, {numbers_of(best_cost), parents_of(best_parent), parents_of(best_order)}, true,
          [](int64_t, int64_t) {});
}

Tensor dp_combine(const std::vector<Tensor>& basis, const Tensor& index,
                  const Tensor& coefficients) {
  const AffineChecker check("dp_combine", index);
  check.combine(basis, index, coefficients);
  const int64_t targets = index.size(1), elements = elements_of(basis[0]);
  check_limits(check, "basis[0]", 0, elements);
  Combination c{};
  c.basis = make_basis(check, basis, index);
  c.coefficients = coefficients.const_data_ptr<double>();
  for (int d = 0; d < 3; ++d) c.strides[d] = coefficients.stride(d);

  Gpu gpu(check, basis[0], kFewerTargets);
  std::vector<int64_t> sizes(basis[0].sizes().begin(), basis[0].sizes().end());
  sizes[0] = targets;
  Tensor out = gpu.make(sizes);
  combine(gpu, c, view_rows(check, "out", out), elements, targets, basis[0].size(1));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(oss, CUDA, m) {
  m.impl("dp_argmin_", TORCH_BOX(&dp_argmin_));
  m.impl("dp_combine", TORCH_BOX(&dp_combine));
}

}  // namespace oss::cuda
