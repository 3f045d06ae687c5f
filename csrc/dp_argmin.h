// The contract of the operators on candidates of any affine form, and their argument checks.
//
//   dp_argmin_(basis[], index, coefficients, terms[], first_source, target, best_cost!,
//              best_parent!, best_order!, *, source_mask=None, reduce="none")
//   dp_combine(basis[], index, coefficients) -> [T, B, *dims]
//
// basis: 1 to 6 tensors [rows, B, *dims], any strides, each with rows of its own number; target:
// [N+1, B, *dims]. basis[0] and target are alike, the others too or 16-bit beside float32. For an
// order o, a source i = first_source + c and a target j < i of sample b,
//
//   candidate = sum over r < terms[o] of coefficients[o, r, c, j, b] * basis[r][index[r, c, b], b]
//   cost      = mean((candidate - target[j, b])^2)
//
// with the arithmetic of dp_step, whose candidate state + (t[j] - t[i]) * velocity is the case of
// terms 1 and t[j] - t[i]: coefficients are rounded once, terms are added in order, and the sums
// are the same. index: int64 [R, C, B], -1 where the source has no such term. coefficients: float64
// [O, R, C, N+1, B], or [..., 1] for all samples; NaN in term 0 says that there is no such
// candidate. best_order is the parent's order. Ties go to the largest source, then to the lowest
// order; the rest as in dp_step.h, and chunks of sources as in dp_accumulate_, but nothing moves.
// dp_combine is the sum alone, for index and coefficients [R, T, B]; -1 leaves a term out.
//
// Values are checked where the tensors are in host memory: indices in range, coefficients finite.
#pragma once

#include "dp_step.h"

namespace oss {

constexpr int64_t kBasisLimit = 6;
constexpr int64_t kOrderLimit = 4;

class AffineChecker : public Checker {
 public:
  using Checker::Checker;

  // Tensors [rows, B, *dims] like `main`, the first of its dtype.
  void basis(const std::vector<Tensor>& basis, const char* main_name, const Tensor& main) const {
    for (size_t r = 0; r < basis.size(); ++r) {
      const std::string name = "basis[" + std::to_string(r) + "]";
      rows(name.c_str(), basis[r], 1);
      rows_like(name.c_str(), basis[r], main_name, main, basis[r].size(0));
      r == 0 ? dtype(name.c_str(), basis[r], main.scalar_type())
             : dtype_beside(name.c_str(), basis[r], main_name, main);
    }
  }

  void count(const std::vector<Tensor>& basis) const {
    if (basis.empty() || static_cast<int64_t>(basis.size()) > kBasisLimit)
      error("basis must hold 1 to ", kBasisLimit, " tensors, got ", basis.size());
  }

  // Those of dp_argmin_; gives the reduction.
  Reduction argmin(const std::vector<Tensor>& basis, const Tensor& index,
                   const Tensor& coefficients, const std::vector<int64_t>& terms,
                   int64_t first_source, const Tensor& target, const Tensor& best_cost,
                   const Tensor& best_parent, const Tensor& best_order,
                   const std::optional<Tensor>& mask, const std::string& reduce) const {
    count(basis);
    rows("target", target, 2);
    this->basis(basis, "target", target);
    const int64_t rows = target.size(0), samples = target.size(1);
    const int64_t most = static_cast<int64_t>(basis.size());
    const int64_t orders = static_cast<int64_t>(terms.size());
    if (orders < 1 || orders > kOrderLimit)
      error("terms must name 1 to ", kOrderLimit, " orders, got ", orders);
    for (const int64_t n : terms)
      if (n < 1 || n > most)
        error("terms must be in [1, ", most, "], the size of basis, got ", shape_text(terms));
    const int64_t sources = chunk_of(index, most, samples, "[R, C, B]");
    if (first_source < 1 || first_source + sources > rows)
      error("first_source must be in [1, N+1 - C] = [1, ", rows - sources, "], got ", first_source);
    device("coefficients", coefficients);
    dtype("coefficients", coefficients, ScalarType::Double);
    const bool shared = coefficients.dim() == 5 && coefficients.size(4) == 1;
    shape("coefficients", coefficients, {orders, most, sources, rows, shared ? 1 : samples},
          "[O, R, C, N+1, B] or [O, R, C, N+1, 1]");
    source_mask(mask, target);
    const Reduction reduced = reduction(reduce);
    best(best_cost, best_parent, target, reduced != Reduction::none);
    device("best_order", best_order);
    dtype("best_order", best_order, ScalarType::Long);
    shape("best_order", best_order, {rows, best_parent.size(1)},
          "best_parent's shape");
    own_memory("best_order", best_order, 0);
    own_memory("best_order", best_order, 1);
    return reduced;
  }

  void combine(const std::vector<Tensor>& basis, const Tensor& index,
               const Tensor& coefficients) const {
    count(basis);
    rows("basis[0]", basis[0], 1);
    this->basis(basis, "basis[0]", basis[0]);
    const int64_t most = static_cast<int64_t>(basis.size()), samples = basis[0].size(1);
    const int64_t targets = chunk_of(index, most, samples, "[R, T, B]");
    device("coefficients", coefficients);
    dtype("coefficients", coefficients, ScalarType::Double);
    shape("coefficients", coefficients, {most, targets, samples}, "[R, T, B]");
  }

 private:
  // [R, C, B], int64; gives C, at least 1.
  int64_t chunk_of(const Tensor& index, int64_t terms, int64_t samples, const char* text) const {
    device("index", index);
    dtype("index", index, ScalarType::Long);
    const int64_t sources = index.dim() == 3 ? index.size(1) : 1;
    shape("index", index, {terms, std::max<int64_t>(1, sources), samples}, text);
    return sources;
  }
};

}  // namespace oss
