// The CPU kernels without torch, on every instruction set that the machine has and on the tile
// shapes of AVX-512 emulated, against the definition in long double: all storage types, strides,
// masks, reductions, chunks in place, thread counts. `make sanitize` runs it.

#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/capability.h"
#include "cpu/step.h"

namespace oss::cpu::emulated {

#include "cpu/loops.h"
#include "cpu/rows.h"
#include "tests/vec_emulated.h"

const Kernels kernels = {"emulated", cost, advance};

}  // namespace oss::cpu::emulated

using namespace oss::cpu;

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

std::mt19937 random_bits(1);

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}

int64_t size_of(DType dtype) { return emulated::size_of(dtype); }

// [rows, samples, outer, inner] in an allocation of its own, its elements `step` apart.
struct Array {
  DType dtype;
  int64_t rows, samples, outer, inner, step;
  std::vector<char> bytes;

  Array(DType dtype, int64_t rows, int64_t samples, int64_t outer, int64_t inner, int64_t step)
      : dtype(dtype), rows(rows), samples(samples), outer(outer), inner(inner), step(step) {
    bytes.resize(((rows * samples * outer * inner - 1) * step + 1) * size_of(dtype));
  }

  int64_t elements() const { return outer * inner; }

  Tensor3 view() {
    const int64_t size = step * size_of(dtype);
    Tensor3 out{};
    out.rows = {bytes.data(), dtype, step == 1, samples * elements() * size, 1,
                {elements()}, {size}};
    out.sample_stride = elements() * size;
    if (step > 1) {
      out.rows.ndim = 2;
      out.rows.sizes[0] = outer, out.rows.strides[0] = inner * size;
      out.rows.sizes[1] = inner, out.rows.strides[1] = size;
    }
    return out;
  }

  char* at(int64_t row, int64_t sample, int64_t element) {
    return bytes.data() + ((row * samples + sample) * elements() + element) * step * size_of(dtype);
  }

  double get(int64_t row, int64_t sample, int64_t element) {
    if (dtype == DType::float64) {
      double value;
      std::memcpy(&value, at(row, sample, element), sizeof value);
      return value;
    }
    float value;
    emulated::decode(&value, at(row, sample, element), dtype, 1);
    return value;
  }

  void set(int64_t row, int64_t sample, int64_t element, double value) {
    const float narrow = static_cast<float>(value);
    if (dtype == DType::float64)
      std::memcpy(at(row, sample, element), &value, sizeof value);
    else
      emulated::encode(at(row, sample, element), &narrow, dtype, 1);
  }

  void fill(double low, double high) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t b = 0; b < samples; ++b)
        for (int64_t e = 0; e < elements(); ++e) set(i, b, e, uniform(low, high));
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
  std::vector<double> cost;
  std::vector<int64_t> parent;
  bool operator==(const Outcome& other) const {
    return next == other.next && cost == other.cost && parent == other.parent;
  }
};

int failures = 0;

void expect(bool good, const char* kernels, const Case& c, const char* what) {
  if (good) return;
  ++failures;
  std::printf("%s: N=%ld B=%ld D=%ldx%ld step %ld dtypes %d %d mask %ld reduce %d: %s\n", kernels,
              long(c.last), long(c.samples), long(c.outer), long(c.inner), long(c.step),
              int(c.dtype), int(c.velocity_dtype), long(c.mask_samples), int(c.reduce), what);
}

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
  const int64_t rows = c.last + 1;
  Array state(c.dtype, rows, c.samples, c.outer, c.inner, 1);
  Array velocity(c.velocity_dtype, rows, c.samples, c.outer, c.inner, c.step);
  Array teacher(c.dtype, rows, c.samples, c.outer, c.inner, c.step);
  state.fill(-1, 1), velocity.fill(-1, 1), teacher.fill(-1, 1);

  Problem p{};
  p.last = c.last, p.samples = c.samples, p.elements = c.outer * c.inner;
  p.state = state.view(), p.velocity = velocity.view(), p.teacher = teacher.view();
  p.first_source = 0, p.end_source = rows, p.reduce = c.reduce;
  for (int64_t i = 0; i < rows; ++i) p.times.push_back((i + uniform(0, 0.5)) / rows);
  p.times.resize(rows + kMaxTile);
  p.mask_samples = std::max<int64_t>(1, c.mask_samples);
  for (int64_t k = 0; k < rows * c.mask_samples; ++k) p.mask.push_back(uniform(0, 1) < 0.7);
  const auto is_live = [&](int64_t i, int64_t b) {
    return i > 0 && (p.mask.empty() || p.mask[i * p.mask_samples + (p.mask_samples > 1 ? b : 0)]);
  };
  for (int64_t i = 0; i < rows; ++i)  // what is not live must not matter
    for (int64_t b = 0; b < c.samples; ++b)
      for (int64_t e = 0; e < p.elements && !is_live(i, b); ++e) velocity.set(i, b, e, NAN);

  const Outcome one = whole(p, kernels, 1, state);
  expect(whole(p, kernels, 2, state) == one, kernels.name, c, "2 threads differ");
  const int64_t many = c.last > kMaxPanelRows ? 70 : 5;  // little memory for each: several panels
  expect(whole(p, kernels, many, state) == one, kernels.name, c, "many threads differ");
  expect(in_chunks(p, kernels, c.last, state) == one, kernels.name, c, "one chunk differs");
  expect(in_chunks(p, kernels, 3, state) == one, kernels.name, c, "chunks of 3 differ");

  const double unit = c.dtype == DType::float64 ? 0x1p-53 : 0x1p-24;
  const double rounding = c.dtype == DType::bfloat16  ? 0x1p-8
                          : c.dtype == DType::float16 ? 0x1p-11
                                                      : 2 * unit;
  const bool shared = c.reduce != Reduction::none;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t b = 0; b < c.samples; ++b) {
      const int64_t i = one.parent[shared ? j : j * c.samples + b];
      const double cost = one.cost[j * c.samples + b];
      Array next = state;
      next.bytes = one.next;
      if (i < 0) {
        for (int64_t e = 0; e < p.elements; ++e)
          if (next.get(j, b, e) != state.get(j, b, e))
            return expect(false, kernels.name, c, "a dead row moved");
        expect(cost == kInf, kernels.name, c, "a dead row has a cost");
        continue;
      }
      long double sum = 0;
      double worst = 0;
      for (int64_t e = 0; e < p.elements; ++e) {
        const double candidate =
            state.get(i, b, e) + (p.times[j] - p.times[i]) * velocity.get(i, b, e);
        const long double difference = candidate - teacher.get(j, b, e);
        sum += difference * difference;
        worst = std::max(worst, std::fabs(next.get(j, b, e) - candidate));
      }
      const double reference = static_cast<double>(sum / p.elements);
      expect(worst <= 2 * rounding, kernels.name, c, "next state");
      const double d = 8 * unit;
      const double tolerance = 128 * unit * reference + 2 * std::sqrt(reference) * d + d * d;
      expect(std::fabs(cost - reference) <= tolerance, kernels.name, c, "cost");
    }
  }
  // What the selection saw is what dp_cost gives, and nothing beats the chosen source.
  if (shared) return;
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
          for (const int64_t mask_samples : {int64_t{0}, int64_t{1}, b})
            for (const int64_t step : {1, 3}) {
              check({n, b, outer, inner, step, dtype, velocity, mask_samples, reduce}, *kernels);
              ++cases;
            }
  }
  std::printf("%d cases on %zu kernels, %d failures\n", cases, all.size(), failures);
  return failures != 0;
}
