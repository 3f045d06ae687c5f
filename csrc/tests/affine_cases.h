// Random candidates of any affine form and what the best of them are by definition, for the tests
// of kernels that run without torch. What no kernel may read is NaN.
#pragma once

#include "tests/cases.h"

namespace oss::tests {

// The best of every target, [rows, samples] or, with a reduction, parent and order [rows].
struct Found {
  std::vector<double> cost;
  std::vector<int64_t> parent, order;
  bool operator==(const Found& other) const {
    return cost == other.cost && parent == other.parent && order == other.order;
  }
};

struct AffineCase {
  Case c;                  // velocity_dtype: of every second tensor of the basis
  std::vector<int> terms;  // of every order
  bool shared;             // one set of coefficients for all samples
  int64_t shift = 0;       // unused elements before the first of every tensor
};

struct AffineInputs {
  AffineCase a;
  Case c;
  Inputs in;  // its teacher and its mask
  int64_t most, columns;
  std::vector<Array> basis;
  std::vector<int64_t> index;        // [most, N, B]
  std::vector<double> coefficients;  // [orders, most, N, N+1, columns]

  explicit AffineInputs(const AffineCase& a)
      : a(a),
        c(a.c),
        in(a.c, a.shift),
        most(*std::max_element(a.terms.begin(), a.terms.end())),
        columns(a.shared ? 1 : a.c.samples) {
    index.assign(most * c.last * c.samples, -1);
    coefficients.assign(orders() * most * c.last * in.rows * columns, NAN);
    std::vector<unsigned char> short_of(c.last + 1);  // sources without a third term
    for (unsigned char& one : short_of) one = uniform(0, 1) < 0.3;
    for (int64_t o = 0; o < orders(); ++o)
      for (int64_t i = 1; i <= c.last; ++i)
        for (int64_t j = 0; j < i; ++j)
          for (int64_t b = 0; b < columns; ++b) {
            const bool missing = uniform(0, 1) < 0.2 || (a.terms[o] > 2 && short_of[i]);
            for (int r = 0; r < a.terms[o]; ++r)
              factor(o, r, i, j, b) = r == 0 && missing ? NAN : uniform(-1, 1);
          }
    for (int64_t r = 0; r < most; ++r) {  // with rows of its own number
      const DType dtype = r % 2 == 1 ? c.velocity_dtype : c.dtype;
      basis.emplace_back(dtype, in.rows + r, c.samples, c.outer, c.inner, c.step, a.shift);
      for (int64_t k = 0; k < in.rows + r; ++k)
        for (int64_t b = 0; b < c.samples; ++b)
          for (int64_t e = 0; e < in.elements(); ++e) basis[r].set(k, b, e, NAN);
      for (int64_t i = 1; i <= c.last; ++i)
        for (int64_t b = 0; b < c.samples; ++b) {
          const bool used = in.live(i, b) && !(r >= 2 && short_of[i]);
          // Where no candidate needs it, an index is no row.
          row(r, i, b) = used ? int64_t(uniform(0, in.rows + r)) : r % 2 == 0 ? -1 : 1 << 20;
          for (int64_t e = 0; used && e < in.elements(); ++e)
            basis[r].set(row(r, i, b), b, e, uniform(-1, 1));
        }
    }
  }

  int64_t orders() const { return static_cast<int64_t>(a.terms.size()); }

  int64_t& row(int64_t r, int64_t i, int64_t b) {
    return index[(r * c.last + i - 1) * c.samples + b];
  }
  double& factor(int64_t o, int64_t r, int64_t i, int64_t j, int64_t b) {
    return coefficients[(((o * most + r) * c.last + i - 1) * in.rows + j) * columns +
                        (a.shared ? 0 : b)];
  }

  bool there(int64_t o, int64_t i, int64_t j, int64_t b) {
    return j < i && in.live(i, b) && !std::isnan(factor(o, 0, i, j, b));
  }

  long double candidate(int64_t o, int64_t i, int64_t j, int64_t b, int64_t e) {
    long double sum = 0;
    for (int r = 0; r < a.terms[o]; ++r)
      sum += static_cast<long double>(factor(o, r, i, j, b)) *
             basis[r].get(row(r, i, b), b, e);
    return sum;
  }

  double cost(int64_t o, int64_t i, int64_t j, int64_t b) {
    if (!there(o, i, j, b)) return INFINITY;
    long double sum = 0;
    for (int64_t e = 0; e < in.elements(); ++e) {
      const long double difference = candidate(o, i, j, b, e) - in.teacher.get(j, b, e);
      sum += difference * difference;
    }
    return static_cast<double>(sum / in.elements());
  }

  // The error model of the contract: terms and target come to 7 at most.
  double tolerance(double cost) const {
    const double unit = c.dtype == DType::float64 ? 0x1p-53 : 0x1p-24, d = 4 * 7 * unit;
    return 128 * unit * cost + 2 * std::sqrt(cost) * d + d * d;
  }

  // Every cost, parent and order by the definition.
  void check(const Found& found, const char* kernels) {
    const bool shared = c.reduce != Reduction::none;
    for (int64_t j = 0; j < in.rows; ++j)
      for (int64_t b = 0; b < (shared ? 1 : c.samples); ++b) {
        const int64_t at = shared ? j : j * c.samples + b;
        const int64_t parent = found.parent[at], order = found.order[at];
        const int64_t end = shared ? c.samples : b + 1;
        if (parent < 0) {
          expect(order == -1 && std::isinf(found.cost[j * c.samples + b]), kernels, c,
                 "no parent, but an order or a cost");
        } else if (!(parent > j && parent <= c.last && order >= 0 && order < orders())) {
          return expect(false, kernels, c, "a winner that is none");
        }
        double chosen_slack = 0, slack = 0;
        const double chosen =
            parent < 0 ? INFINITY : score(order, parent, j, b, end, chosen_slack);
        expect(parent < 0 || std::isfinite(chosen), kernels, c, "a candidate that is not there");
        for (int64_t k = b; parent >= 0 && k < end; ++k) {
          const double own = cost(order, parent, j, k);
          expect(std::fabs(found.cost[j * c.samples + k] - own) <= tolerance(own), kernels, c,
                 "cost of the winner");
        }
        for (int64_t o = 0; o < orders(); ++o)
          for (int64_t i = j + 1; i <= c.last; ++i) {
            const double other = score(o, i, j, b, end, slack);
            if (!std::isfinite(other)) continue;
            expect(other >= chosen - chosen_slack - slack, kernels, c,
                   "a better candidate was passed over");
          }
      }
  }

 private:
  // Over samples [b, end), and how uncertain it is.
  double score(int64_t o, int64_t i, int64_t j, int64_t b, int64_t end, double& slack) {
    double sum = 0;
    slack = 0;
    for (int64_t k = b; k < end; ++k) {
      const double one = cost(o, i, j, k);
      if (std::isinf(one)) return INFINITY;
      const bool log = c.reduce == Reduction::log_mean;
      sum += log ? std::log(std::max(one, 0x1p-126)) : one;
      slack += log ? tolerance(one) / std::max(one, 1e-30) : tolerance(one);
    }
    return sum;
  }
};

}  // namespace oss::tests
