// The CPU kernels without torch, on every instruction set that the machine has and on the tile
// shapes of AVX-512 emulated, against the definition in long double: all storage types, strides,
// masks, reductions, chunks in place, thread counts, candidates of any form. `make sanitize` runs
// it.

#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/capability.h"
#include "cpu/step.h"
#include "tests/cases.h"

namespace oss::cpu::emulated {

// clang-format off: each needs the ones before.
#include "tests/vec_emulated.h"
#include "cpu/rows.h"
#include "cpu/loops.h"
// clang-format on

const Kernels kernels = {"emulated", cost, advance};

}  // namespace oss::cpu::emulated

using namespace oss::cpu;
using namespace oss::tests;
using oss::DType;
using oss::Reduction;
using oss::Tensor3;

namespace {

struct Threads {
  int64_t count;
  int64_t threads() const { return count; }

  template <class Task>
  void run(int64_t tasks, const Task& task) const {
    std::vector<std::thread> pool;
    for (int64_t worker = 0; worker < tasks; ++worker)
      pool.emplace_back([&, worker] { task(worker); });
    for (std::thread& thread : pool) thread.join();
  }
};

Outcome whole(const Problem& p, const Kernels& kernels, int64_t threads, Array next) {
  Best best(p.last + 1, p.samples, p.reduce);
  const Tensor3 to = next.view();
  step(p, kernels, Threads{threads}, best, &to, Absent::kept);
  return {next.bytes, best.cost, best.parent};
}

Outcome in_chunks(Problem p, const Kernels& kernels, int64_t chunk, Array state) {
  Best best(p.last + 1, p.samples, p.reduce);
  const Tensor3 velocity = p.basis[1];
  p.basis[0] = state.view();
  for (int64_t first = 1; first <= p.last; first += chunk) {
    p.first_source = first;
    p.end_source = std::min(p.last + 1, first + chunk);
    p.basis[1] = velocity;
    p.basis[1].rows.data += first * velocity.rows.row_stride;
    step(p, kernels, Threads{2}, best, &p.basis[0], Absent::untouched);
  }
  return {state.bytes, best.cost, best.parent};
}

// What dp_argmin_ gives, `chunk` sources at a time.
Best argmin(Problem p, const Kernels& kernels, int64_t threads, int64_t chunk) {
  Best best(p.last + 1, p.samples, p.reduce);
  const Affine all = p.affine;
  for (int64_t first = 1; first <= p.last; first += chunk) {
    p.first_source = first;
    p.end_source = std::min(p.last + 1, first + chunk);
    p.affine.index = all.index + (first - 1) * all.index_strides[1];
    p.affine.coefficients = all.coefficients + (first - 1) * all.strides[2];
    step(p, kernels, Threads{threads}, best, nullptr, Absent::untouched);
  }
  return best;
}

bool same(const Best& a, const Best& b) {
  return a.cost == b.cost && a.parent == b.parent && a.order == b.order;
}

// Random candidates of three orders, some of them missing, and Euler's step as one of them.
void check_affine(const Case& c, const Kernels& kernels, Inputs& inputs, const Problem& euler,
                  const Outcome& expected) {
  const int64_t n = c.last, rows = inputs.rows, samples = c.samples;
  Problem p = euler;
  p.times.clear();
  std::vector<int64_t> index(3 * n * samples);
  std::vector<double> coefficients(3 * 3 * n * rows * samples);
  const auto row = [&](int64_t r, int64_t i, int64_t b) -> int64_t& {
    return index[(r * n + i - 1) * samples + b];
  };
  const auto factor = [&](int64_t o, int64_t r, int64_t i, int64_t j, int64_t b) -> double& {
    return coefficients[(((o * 3 + r) * n + i - 1) * rows + j) * samples + b];
  };
  p.affine = {index.data(),
              coefficients.data(),
              {n * samples, samples, 1},
              {3 * n * rows * samples, n * rows * samples, rows * samples, samples, 1}};
  for (int64_t i = 1; i <= n; ++i)
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t r = 0; r < 2; ++r) {
        row(r, i, b) = i;
        for (int64_t j = 0; j < rows; ++j)
          factor(0, r, i, j, b) = r == 0 ? 1 : inputs.times[j] - inputs.times[i];
      }
  const Best steps = argmin(p, kernels, 2, n);
  expect(steps.cost == expected.cost && steps.parent == expected.parent, kernels.name, c,
         "Euler's step as terms differs");

  p.terms = 3, p.orders = 3;
  p.terms_of[0] = 3, p.terms_of[1] = 1, p.terms_of[2] = 2;
  p.basis[2] = p.target;
  for (int64_t i = 1; i <= n; ++i)
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t r = 0; r < 3; ++r)  // rows of the velocity that are not live hold NaN
        row(r, i, b) = r == 1 || uniform(0, 1) < 0.5 ? i : n;
      for (int64_t o = 0; o < 3; ++o)
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t r = 0; r < 3; ++r)
            factor(o, r, i, j, b) = r == 0 && uniform(0, 1) < 0.2 ? NAN : uniform(-1, 1);
      for (int64_t j = 0; j < i && i % 4 == 2; ++j) factor(0, 0, i, j, b) = NAN;
      if (i % 4 == 2) row(2, i, b) = -1;  // only order 0 uses it
    }
  const Best one = argmin(p, kernels, 1, n);
  expect(same(argmin(p, kernels, 5, n), one), kernels.name, c, "5 threads differ, affine");
  expect(same(argmin(p, kernels, 2, 3), one), kernels.name, c, "chunks of 3 differ, affine");
  if (c.reduce != Reduction::none) return;
  for (int64_t b = 0; b < samples; ++b)
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = j * samples + b;
      double best = INFINITY, chosen = INFINITY;
      for (int64_t i = j + 1; i <= n; ++i)
        for (int64_t o = 0; o < 3 && inputs.live(i, b); ++o) {
          if (std::isnan(factor(o, 0, i, j, b))) continue;
          long double sum = 0;
          for (int64_t e = 0; e < inputs.elements(); ++e) {
            long double value = -inputs.teacher.get(j, b, e);
            for (int64_t r = 0; r < p.terms_of[o]; ++r) {
              Array& basis = r == 0 ? inputs.state : r == 1 ? inputs.velocity : inputs.teacher;
              value += factor(o, r, i, j, b) * basis.get(row(r, i, b), b, e);
            }
            sum += value * value;
          }
          const double cost = static_cast<double>(sum / inputs.elements());
          best = std::min(best, cost);
          if (i == one.parent[at] && o == one.order[at]) chosen = cost;
        }
      const bool dead = one.parent[at] < 0 && std::isinf(one.cost[at]);
      const double slack = 2 * inputs.tolerance(best);
      const bool good = std::fabs(one.cost[at] - chosen) <= slack && chosen <= best + slack;
      expect(std::isinf(best) ? dead : good, kernels.name, c, "affine cost or choice");
    }
}

void check(const Case& c, const Kernels& kernels) {
  Inputs inputs(c);
  Array& state = inputs.state;
  Problem p{};
  p.last = c.last, p.samples = c.samples, p.elements = inputs.elements();
  p.terms = 2;
  p.basis[0] = state.view(), p.basis[1] = inputs.velocity.view();
  p.target = inputs.teacher.view();
  p.first_source = 0, p.end_source = inputs.rows, p.reduce = c.reduce;
  p.times = inputs.times;
  p.times.resize(inputs.rows + kMaxTile);
  p.mask = inputs.mask;
  p.mask_samples = std::max<int64_t>(1, c.mask_samples);

  const Outcome one = whole(p, kernels, 1, state);
  expect(whole(p, kernels, 2, state) == one, kernels.name, c, "2 threads differ");
  const int64_t many = c.last > kMaxPanelRows ? 70 : 5;  // little memory for each: several panels
  expect(whole(p, kernels, many, state) == one, kernels.name, c, "many threads differ");
  expect(in_chunks(p, kernels, c.last, state) == one, kernels.name, c, "one chunk differs");
  expect(in_chunks(p, kernels, 3, state) == one, kernels.name, c, "chunks of 3 differ");

  inputs.check(one, kernels.name);
  check_affine(c, kernels, inputs, p, one);
  // What the selection saw is what dp_cost gives, and nothing beats the chosen source.
  if (c.reduce != Reduction::none) return;
  const Threads threads{2};
  Costs<Threads> costs(p, kernels, threads);
  for (int64_t b = 0; b < c.samples; ++b) {
    Live live(p, b);
    if (live.runs.empty()) continue;
    const double* cells = costs.of_run(live, live.runs[0], b);
    for (const Pair& pair : live.pairs)
      for (int64_t j = 0; j < pair.source; ++j) {
        const double cost = cells[pair.cells + j], chosen = one.cost[j * c.samples + b];
        const bool tied = cost == chosen && pair.source <= one.parent[j * c.samples + b];
        expect(cost > chosen || tied, kernels.name, c, "a better source was passed over");
      }
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> all{&emulated::kernels};
#ifdef OSS_EMULATED_ONLY
  const int every = 6;  // the thread sanitizer takes its time
#else
  const int every = 1;
  const Available available;
  all.insert(all.end(), available.list, available.list + available.count);
#endif
  const DType f32 = DType::float32, f64 = DType::float64, f16 = DType::float16,
              bf16 = DType::bfloat16;
  const std::pair<DType, DType> dtypes[] = {{f32, f32},   {f64, f64},  {f16, f16},
                                            {bf16, bf16}, {f32, bf16}, {f32, f16}};
  const int64_t shapes[][4] = {
      {1, 1, 1, 1}, {2, 2, 1, 7}, {33, 1, 1, 257}, {21, 3, 5, 103}, {9, 2, 40, 30}};
  int cases = 0;
  for (const Kernels* kernels : all) {
    check({kMaxPanelRows + 30, 1, 1, 300, 1, f32, f32, 0, Reduction::none}, *kernels);
    for (const auto& [n, b, outer, inner] : shapes)
      for (const auto& [dtype, velocity] : dtypes)
        for (const Reduction reduce : {Reduction::none, Reduction::mean, Reduction::log_mean})
          for (const int64_t step : {1, 3}) {
            const int64_t masks[] = {0, 1, b};  // each meets every reduction, and every dtype
            const int64_t mask = masks[(cases / 2 + cases / 6) % 3];
            if (cases % every == 0)
              check({n, b, outer, inner, step, dtype, velocity, mask, reduce}, *kernels);
            ++cases;
          }
  }
  std::printf("%d cases on %zu kernels, %d failures\n", cases / every, all.size(), failures);
  return failures != 0;
}
