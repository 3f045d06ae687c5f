// dp_argmin_ and dp_combine on the CPU. The contract is in csrc/dp_argmin.h, the work in step.h and
// loops.h, which do dp_step too.

#include "dp_argmin.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu/capability.h"
#include "cpu/host.h"
#include "cpu/step.h"
#include "views.h"

namespace oss::cpu {
namespace {

static_assert(kBasisLimit == kMaxTerms && kOrderLimit == kMaxOrders);

// The basis, and the number of samples and elements.
Problem make_problem(const AffineChecker& check, const std::vector<Tensor>& basis) {
  Problem p{};
  p.samples = basis[0].size(1);
  p.elements = basis[0].numel() / (basis[0].size(0) * p.samples);
  p.terms = static_cast<int>(basis.size());
  for (int r = 0; r < p.terms; ++r)
    p.basis[r] = view_rows(check, ("basis[" + std::to_string(r) + "]").c_str(), basis[r]);
  return p;
}

// Every index and coefficient that a live source uses.
void check_values(const Checker& check, const Problem& p, const std::vector<Tensor>& basis) {
  for (int o = 0; o < p.orders; ++o)
    for (int64_t i = p.first_source; i < p.end_source; ++i)
      for (int64_t b = 0; b < p.samples; ++b) {
        if (!p.is_live(i, b) || !p.has(o, i, b)) continue;
        for (int r = 0; r < p.terms_of[o]; ++r) {
          const int64_t row = p.row(r, i, b);
          if (row < 0 || row >= basis[r].size(0))
            check.error("index must be a row of basis[", r, "], 0 to ", basis[r].size(0) - 1,
                        ", where order ", o, " has a candidate, got index[", r, ", ",
                        i - p.first_source, ", ", b, "] = ", row);
          if (b > 0 && p.affine.strides[4] == 0 && p.is_live(i, b - 1)) continue;  // seen before
          for (int64_t j = 0; j < i; ++j) {
            const double c = p.coefficient(o, r, i, j, b);
            if (std::isfinite(c) || std::isnan(p.coefficient(o, 0, i, j, b))) continue;
            check.error("coefficients must be finite, or NaN in term 0 where there is no candidate,"
                        " got ", c, " for order ", o, ", term ", r, ", source ", i, ", target ", j,
                        ", sample ", b);
          }
        }
      }
}

void dp_argmin_(const std::vector<Tensor>& basis, const Tensor& index, const Tensor& coefficients,
                const std::vector<int64_t>& terms, int64_t first_source, const Tensor& target,
                const Tensor& best_cost, const Tensor& best_parent, const Tensor& best_order,
                const std::optional<Tensor>& source_mask, StringHandle reduce) {
  const std::string how = take(reduce);
  const AffineChecker check("dp_argmin_", index);
  const Reduction reduction =
      check.argmin(basis, index, coefficients, terms, first_source, target, best_cost, best_parent,
                   best_order, source_mask, how);
  Problem p = make_problem(check, basis);
  p.last = target.size(0) - 1;
  p.target = view_rows(check, "target", target);
  p.first_source = first_source;
  p.end_source = first_source + index.size(1);
  p.orders = static_cast<int>(terms.size());
  for (int o = 0; o < p.orders; ++o) p.terms_of[o] = static_cast<int>(terms[o]);
  p.affine.index = index.const_data_ptr<int64_t>();
  for (int d = 0; d < 3; ++d) p.affine.index_strides[d] = index.stride(d);
  p.affine.coefficients = coefficients.const_data_ptr<double>();
  for (int d = 0; d < 5; ++d) p.affine.strides[d] = coefficients.stride(d);
  if (coefficients.size(4) == 1) p.affine.strides[4] = 0;
  p.reduce = reduction;
  read_mask(p, source_mask);
  check_best_parent(check, best_parent, first_source);
  check_values(check, p, basis);

  const Matrix<int64_t> order(best_order);
  for_samples(p, [&](const Problem& part, int64_t first) {
    Best best(part.last + 1, part.samples, reduction);
    read_best(best, best_cost, best_parent, first);
    step(part, kernels(), TorchPool(), best, nullptr, Absent::untouched);
    write_best<double>(best, best_cost, best_parent, first);
    for (int64_t j = 0; j < best.targets(); ++j)
      for (int64_t b = 0; b < best.parent_samples; ++b) {
        const int64_t at = j * best.parent_samples + b;
        if (best.parent[at] >= first_source) order(j, first + b) = best.order[at];
      }
  });
}

Tensor dp_combine(const std::vector<Tensor>& basis, const Tensor& index,
                  const Tensor& coefficients) {
  const AffineChecker check("dp_combine", index);
  check.combine(basis, index, coefficients);
  const Problem p = make_problem(check, basis);
  const int64_t targets = index.size(1);
  const int64_t* rows = index.const_data_ptr<int64_t>();
  const double* factors = coefficients.const_data_ptr<double>();
  const auto at = [](const Tensor& tensor, int64_t r, int64_t j, int64_t b) {
    return r * tensor.stride(0) + j * tensor.stride(1) + b * tensor.stride(2);
  };
  for (int r = 0; r < p.terms; ++r)
    for (int64_t j = 0; j < targets; ++j)
      for (int64_t b = 0; b < p.samples; ++b) {
        const int64_t row = rows[at(index, r, j, b)];
        if (row < -1 || row >= basis[r].size(0))
          check.error("index must be -1 or a row of basis[", r, "], 0 to ", basis[r].size(0) - 1,
                      ", got index[", r, ", ", j, ", ", b, "] = ", row);
        const double c = factors[at(coefficients, r, j, b)];
        if (row >= 0 && !std::isfinite(c))
          check.error("coefficients must be finite where a term is used, got coefficients[", r,
                      ", ", j, ", ", b, "] = ", c);
      }

  Tensor out = allocate_rows(check, basis[0], targets, kFewerTargets);
  const Tensor3 to = view_rows(check, "out", out);
  const auto choose = [&](int64_t b, int64_t* chosen, double* weights) {
    for (int64_t j = 0; j < targets; ++j)
      for (int r = 0; r < p.terms; ++r) {
        chosen[j * p.terms + r] = rows[at(index, r, j, b)];
        weights[j * p.terms + r] = factors[at(coefficients, r, j, b)];
      }
  };
  advance(p, targets, kernels(), TorchPool(), choose, &to, Absent::zero, nullptr);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(oss, CPU, m) {
  m.impl("dp_argmin_", TORCH_BOX(&dp_argmin_));
  m.impl("dp_combine", TORCH_BOX(&dp_combine));
}

}  // namespace oss::cpu
