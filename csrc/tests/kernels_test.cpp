// The CPU kernels without torch, on every instruction set that the machine has and on the tile
// shapes of AVX-512 emulated, against the definition in long double: all storage types, strides,
// masks, reductions, chunks in place, thread counts. `make sanitize` runs it.

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
  step(p, kernels, Threads{threads}, best, next.view(), false);
  return {next.bytes, best.cost, best.parent};
}

Outcome in_chunks(Problem p, const Kernels& kernels, int64_t chunk, Array state) {
  Best best(p.last + 1, p.samples, p.reduce);
  const Tensor3 velocity = p.velocity;
  p.state = state.view();
  for (int64_t first = 1; first <= p.last; first += chunk) {
    p.first_source = first;
    p.end_source = std::min(p.last + 1, first + chunk);
    p.velocity = velocity;
    p.velocity.rows.data += first * velocity.rows.row_stride;
    step(p, kernels, Threads{2}, best, state.view(), true);
  }
  return {state.bytes, best.cost, best.parent};
}

void check(const Case& c, const Kernels& kernels) {
  Inputs inputs(c);
  Array& state = inputs.state;
  Problem p{};
  p.last = c.last, p.samples = c.samples, p.elements = inputs.elements();
  p.state = state.view(), p.velocity = inputs.velocity.view(), p.teacher = inputs.teacher.view();
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
  // What the selection saw is what dp_cost gives, and nothing beats the chosen source.
  if (c.reduce != Reduction::none) return;
  const Threads threads{2};
  Costs<Threads> costs(p, kernels, threads);
  for (int64_t b = 0; b < c.samples; ++b) {
    const Live live(p, b);
    const double* cells = costs.of_sample(live, b);
    for (size_t l = 0; l < live.sources.size(); ++l)
      for (int64_t j = 0; j < live.sources[l]; ++j) {
        const double cost = cells[live.offsets[l] + j], chosen = one.cost[j * c.samples + b];
        const int64_t parent = one.parent[j * c.samples + b];
        const bool tied = cost == chosen && live.sources[l] <= parent;
        expect(cost > chosen || tied, kernels.name, c, "a better source was passed over");
      }
  }
}

}  // namespace

int main() {
  std::vector<const Kernels*> all{&emulated::kernels};
  const Available available;
  all.insert(all.end(), available.list, available.list + available.count);
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
            check({n, b, outer, inner, step, dtype, velocity, mask, reduce}, *kernels);
            ++cases;
          }
  }
  std::printf("%d cases on %zu kernels, %d failures\n", cases, all.size(), failures);
  return failures != 0;
}
