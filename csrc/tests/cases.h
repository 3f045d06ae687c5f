// Random inputs of the step and what its outcome must be by definition, for the tests of kernels
// that run without torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "tensors.h"

namespace oss::tests {

inline std::mt19937 random_bits(1);

inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// [rows, samples, outer, inner] in an allocation of its own, its elements `step` apart, behind
// `shift` unused elements.
struct Array {
  DType dtype;
  int64_t rows, samples, outer, inner, step, shift;
  std::vector<char> bytes;

  Array(DType dtype, int64_t rows, int64_t samples, int64_t outer, int64_t inner, int64_t step,
        int64_t shift = 0)
      : dtype(dtype),
        rows(rows),
        samples(samples),
        outer(outer),
        inner(inner),
        step(step),
        shift(shift) {
    const int64_t count = shift + (rows * samples * outer * inner - 1) * step + 1;
    bytes.resize(count * size_of(dtype));
  }

  int64_t elements() const { return outer * inner; }

  Tensor3 view() {
    const int64_t size = step * size_of(dtype);
    Tensor3 out{};
    out.rows = {at(0, 0, 0), dtype,        step == 1, samples * elements() * size,
                1,           {elements()}, {size}};
    out.sample_stride = elements() * size;
    if (step > 1) {
      out.rows.ndim = 2;
      out.rows.sizes[0] = outer, out.rows.strides[0] = inner * size;
      out.rows.sizes[1] = inner, out.rows.strides[1] = size;
    }
    return out;
  }

  char* at(int64_t row, int64_t sample, int64_t element) {
    const int64_t index = (row * samples + sample) * elements() + element;
    return bytes.data() + (shift + index * step) * size_of(dtype);
  }

  double get(int64_t row, int64_t sample, int64_t element) {
    const char* from = at(row, sample, element);
    if (dtype == DType::float64) return read<double>(from);
    if (dtype == DType::float32) return read<float>(from);
    if (dtype == DType::float16) return read<_Float16>(from);
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(from)) << 16;
    return read<float>(reinterpret_cast<const char*>(&bits));
  }

  void set(int64_t row, int64_t sample, int64_t element, double value) {
    char* to = at(row, sample, element);
    if (dtype == DType::float64) return write(to, value);
    if (dtype == DType::float32) return write(to, static_cast<float>(value));
    if (dtype == DType::float16) return write(to, static_cast<_Float16>(value));
    const float narrow = static_cast<float>(value);  // cut, not rounded: any value will do
    write(to, static_cast<uint16_t>(read<uint32_t>(reinterpret_cast<const char*>(&narrow)) >> 16));
  }

  void fill(double low, double high) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t e = 0; e < elements(); ++e) set(i, b, e, uniform(low, high));
  }

 private:
  template <class T>
  static T read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  template <class T>
  static void write(char* to, T value) {
    std::memcpy(to, &value, sizeof value);
  }
};

struct Case {
  int64_t last, samples, outer, inner, step;
  DType dtype, velocity_dtype;
  int64_t mask_samples;  // 0: no mask
  Reduction reduce;
};

struct Outcome {
  std::vector<char> next;
  std::vector<double> cost;     // [rows, samples]
  std::vector<int64_t> parent;  // [rows, samples], or [rows] with a reduction
  bool operator==(const Outcome& other) const {
    return next == other.next && cost == other.cost && parent == other.parent;
  }
};

inline int failures = 0;

inline void expect(bool good, const char* kernels, const Case& c, const char* what) {
  if (good) return;
  ++failures;
  std::printf("%s: N=%ld B=%ld D=%ldx%ld step %ld dtypes %d %d mask %ld reduce %d: %s\n", kernels,
              long(c.last), long(c.samples), long(c.outer), long(c.inner), long(c.step),
              int(c.dtype), int(c.velocity_dtype), long(c.mask_samples), int(c.reduce), what);
}

// The inputs of a case; velocities that are not live are NaN, since they must not matter.
struct Inputs {
  Case c;
  int64_t rows;
  Array state, velocity, teacher;
  std::vector<double> times;
  std::vector<double> every_other;  // the times, for kernels that take strides
  std::vector<unsigned char> mask;  // [rows, mask_samples], empty: all live

  explicit Inputs(const Case& c, int64_t shift = 0)
      : c(c),
        rows(c.last + 1),
        state(c.dtype, rows, c.samples, c.outer, c.inner, 1),
        velocity(c.velocity_dtype, rows, c.samples, c.outer, c.inner, c.step, shift),
        teacher(c.dtype, rows, c.samples, c.outer, c.inner, c.step, shift) {
    state.fill(-1, 1), velocity.fill(-1, 1), teacher.fill(-1, 1);
    for (int64_t i = 0; i < rows; ++i) times.push_back((i + uniform(0, 0.5)) / rows);
    for (int64_t k = 0; k < rows * c.mask_samples; ++k) mask.push_back(uniform(0, 1) < 0.7);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t b = 0; b < c.samples; ++b)
        for (int64_t e = 0; e < elements() && !live(i, b); ++e) velocity.set(i, b, e, NAN);
  }

  int64_t elements() const { return c.outer * c.inner; }

  bool live(int64_t i, int64_t b) const {
    if (i == 0 || mask.empty()) return i > 0;
    return mask[i * c.mask_samples + (c.mask_samples > 1 ? b : 0)] != 0;
  }

  double candidate(int64_t i, int64_t j, int64_t b, int64_t e) {
    return state.get(i, b, e) + (times[j] - times[i]) * velocity.get(i, b, e);
  }

  double cost(int64_t i, int64_t j, int64_t b) {
    long double sum = 0;
    for (int64_t e = 0; e < elements(); ++e) {
      const long double difference = candidate(i, j, b, e) - teacher.get(j, b, e);
      sum += difference * difference;
    }
    return static_cast<double>(sum / elements());
  }

  // How far a cost may be from the definition: the error model of the contract, tightened.
  double tolerance(double cost) const {
    const double unit = c.dtype == DType::float64 ? 0x1p-53 : 0x1p-24, d = 8 * unit;
    return 128 * unit * cost + 2 * std::sqrt(cost) * d + d * d;
  }

  // Every cost, parent and next state of the outcome by the definition.
  void check(const Outcome& one, const char* kernels) {
    const double rounding = c.dtype == DType::bfloat16  ? 0x1p-8
                            : c.dtype == DType::float16 ? 0x1p-11
                            : c.dtype == DType::float32 ? 0x1p-23
                                                        : 0x1p-52;
    const bool shared = c.reduce != Reduction::none;
    Array next = state;
    next.bytes = one.next;
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t b = 0; b < c.samples; ++b) {
        const int64_t parent = one.parent[shared ? j : j * c.samples + b];
        const double cost = one.cost[j * c.samples + b];
        if (parent < 0) {
          for (int64_t e = 0; e < elements(); ++e)
            if (next.get(j, b, e) != state.get(j, b, e))
              return expect(false, kernels, c, "a dead row moved");
          expect(std::isinf(cost), kernels, c, "a dead row has a cost");
        } else {
          double worst = 0;
          for (int64_t e = 0; e < elements(); ++e)
            worst = std::max(worst, std::fabs(next.get(j, b, e) - candidate(parent, j, b, e)));
          expect(worst <= 2 * rounding, kernels, c, "next state");
          const double reference = this->cost(parent, j, b);
          const bool near = std::fabs(cost - reference) <= tolerance(reference);
          expect(near, kernels, c, "cost");
        }
      }
      for (int64_t b = 0; b < (shared ? 1 : c.samples); ++b)
        check_parent(one.parent[shared ? j : j * c.samples + b], j, b, shared, kernels);
    }
  }

 private:
  // What a source scores for a target, and how uncertain that is; live sources only.
  double score(int64_t i, int64_t j, int64_t b, bool shared, double& slack) {
    double sum = 0;
    slack = 0;
    for (int64_t k = shared ? 0 : b; k < (shared ? c.samples : b + 1); ++k) {
      const double one = cost(i, j, k);
      const bool log = c.reduce == Reduction::log_mean;
      sum += log ? std::log(std::max(one, 0x1p-126)) : one;
      slack += log ? tolerance(one) / std::max(one, 1e-30) : tolerance(one);
    }
    return sum;
  }

  void check_parent(int64_t parent, int64_t j, int64_t b, bool shared, const char* kernels) {
    const auto is_live = [&](int64_t i) {
      if (!shared) return live(i, b);
      for (int64_t k = 0; k < c.samples; ++k)
        if (!live(i, k)) return false;
      return true;
    };
    double chosen_slack = 0, slack = 0;
    const double chosen = parent < 0 ? INFINITY : score(parent, j, b, shared, chosen_slack);
    expect(parent < 0 || (parent > j && parent <= c.last && is_live(parent)), kernels, c,
           "a parent that is no live source");
    for (int64_t i = j + 1; i <= c.last; ++i) {
      if (!is_live(i)) continue;
      const double other = score(i, j, b, shared, slack);
      expect(other >= chosen - chosen_slack - slack, kernels, c, "a better source was passed over");
    }
  }
};

}  // namespace oss::tests
