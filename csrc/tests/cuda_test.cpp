// The CUDA kernels on the host (tests/cuda_on_host.h), against the definition in long double: all
// storage types, alignments, strides, masks, reductions, ties, NaN, chunks in place, groups of
// samples; Euler's steps and candidates of any affine form. And how a step is cut into blocks
// (tests/launch_checks.h). `make sanitize` runs it.

#include "cuda/step.h"
#include "tests/affine_cases.h"
#include "tests/cuda_device.h"
#include "tests/launch_checks.h"

using namespace oss::cuda;
using namespace oss::tests;
using oss::DType;
using oss::Reduction;
using oss::Tensor3;

namespace {

Problem<EulerSteps> problem_of(Inputs& in) {
  Problem<EulerSteps> p{};
  p.steps = in.c.last, p.samples = in.c.samples, p.elements = in.elements();
  in.every_other.assign(2 * in.rows, NAN);
  for (int64_t i = 0; i < in.rows; ++i) in.every_other[2 * i] = in.times[i];
  p.of = {in.state.view(), in.velocity.view(), in.every_other.data(), 2, 0};
  p.target = in.teacher.view();
  if (!in.mask.empty())
    p.mask = {reinterpret_cast<const bool*>(in.mask.data()), in.c.mask_samples,
              in.c.mask_samples > 1};
  p.begin_source = 1, p.end_source = in.rows, p.reduce = in.c.reduce;
  return p;
}

Parents parents_of(std::vector<int64_t>& parent, const Case& c) {
  const bool shared = c.reduce != Reduction::none;
  parent.assign((c.last + 1) * (shared ? 1 : c.samples), -1);
  return {parent.data(), shared ? 1 : c.samples, shared ? 0 : 1};
}

Outcome whole(Inputs& in, const Device& device, int64_t* workspace = nullptr) {
  Host gpu(device);
  Outcome out;
  out.cost.assign(in.rows * in.c.samples, NAN);
  Array next = in.state;
  std::fill(next.bytes.begin(), next.bytes.end(), static_cast<char>(0xff));
  const Parents parents = parents_of(out.parent, in.c);
  std::fill(out.parent.begin(), out.parent.end(), 1 << 20);
  step(gpu, problem_of(in), {{out.cost.data(), true, in.c.samples, 1}, parents, {}}, next.view(),
       false);
  out.next = next.bytes;
  if (workspace != nullptr) *workspace = gpu.workspace_bytes;
  return out;
}

Outcome in_chunks(const Inputs& inputs, const Device& device, int64_t chunk) {
  Inputs in = inputs;
  Outcome out;
  out.cost.assign(in.rows * in.c.samples, INFINITY);
  const Parents parents = parents_of(out.parent, in.c);
  const Problem<EulerSteps> all = problem_of(in);
  for (int64_t first = 1; first < in.rows; first += chunk) {
    Host gpu(device);
    Problem<EulerSteps> p = all;
    p.of.first_source = p.begin_source = first;
    p.end_source = std::min(in.rows, first + chunk);
    p.of.velocity.rows.data += first * p.of.velocity.rows.row_stride;
    step(gpu, p, {{out.cost.data(), true, in.c.samples, 1}, parents, {}}, in.state.view(), true);
  }
  out.next = in.state.bytes;
  return out;
}

// The step from its pieces: all costs, the argmin over them, the advance.
Outcome in_pieces(Inputs& in, const Device& device) {
  Host gpu(device);
  const Problem<EulerSteps> p = problem_of(in);
  std::vector<double> cost(in.rows * in.rows * in.c.samples, NAN);
  means(gpu, p, cost.data());
  Outcome out;
  out.cost.assign(in.rows * in.c.samples, NAN);
  const Parents parents = parents_of(out.parent, in.c);
  const OfferedCosts given{cost.data(), in.rows * in.c.samples, in.c.samples,
                           1,           in.c.samples,           in.c.reduce};
  select_costs(gpu, given, in.rows, {{out.cost.data(), true, in.c.samples, 1}, parents, {}});
  Array next = in.state;
  std::fill(next.bytes.begin(), next.bytes.end(), static_cast<char>(0xff));
  advance(gpu, p, parents, next.view(), 0, in.c.samples, false);
  out.next = next.bytes;
  return out;
}

void check(const Case& c, int64_t shift, const Device& device) {
  Inputs in(c, shift);
  int64_t workspace = 0;
  const Outcome one = whole(in, device, &workspace);
  in.check(one, "cuda");
  expect(workspace <= kWorkspaceBytes, "cuda", c, "the workspace is too large");
  expect(in_pieces(in, device) == one, "cuda", c, "the pieces differ");
  expect(in_chunks(in, device, c.last) == one, "cuda", c, "one chunk differs");
  const int64_t some = std::max<int64_t>(3, c.last / 5);
  expect(in_chunks(in, device, some) == one, "cuda", c, "chunks differ");
}

// Equal sources tie, and the largest wins, also of another thread, warp or chunk; NaN and inf never
// do. Sample 1 has no finite source.
void check_ties() {
  const Case c{150, 2, 1, 5, 1, DType::float32, DType::float32, 0, Reduction::none};
  Inputs in(c);
  std::fill(in.times.begin(), in.times.end(), 0.0);  // of no consequence: all velocities are 0
  for (int64_t i = 0; i < in.rows; ++i)
    for (int64_t e = 0; e < 5; ++e) {
      in.state.set(i, 0, e, in.state.get(0, 0, e));
      in.velocity.set(i, 0, e, 0);
      in.velocity.set(i, 1, e, NAN);
    }
  in.state.set(150, 0, 3, NAN), in.state.set(149, 0, 4, INFINITY), in.velocity.set(148, 0, 0, NAN);
  const Device& device = devices[1];
  for (const Outcome& out : {whole(in, device), in_pieces(in, device), in_chunks(in, device, 128)})
    for (int64_t j = 0; j < in.rows; ++j) {
      const int64_t expected = j < 147 ? 147 : -1;
      expect(out.parent[j * 2] == expected, "cuda", c, "a tie went to another than the largest");
      expect(out.parent[j * 2 + 1] == -1, "cuda", c, "a source that is not finite won");
    }
}

// Long rows: the sums are flushed, and splits end in the middle of everything.
void check_flushes() {
  const Case c{3,
               1,
               1,
               kFlushElements + 9 * kUnit + 69,
               1,
               DType::float32,
               DType::float32,
               0,
               Reduction::none};
  check(c, 0, {1, kRoomyBytes});
}

// --- Candidates of any affine form ---

Problem<AffineTerms> problem_of(AffineInputs& in) {
  Problem<AffineTerms> p{};
  const Problem<EulerSteps> like = problem_of(in.in);
  p.steps = like.steps, p.samples = like.samples, p.elements = like.elements;
  p.target = like.target, p.mask = like.mask, p.reduce = like.reduce;
  p.begin_source = 1, p.end_source = in.in.rows;
  const int64_t n = in.c.last, rows = in.in.rows, b = in.c.samples;
  p.of.basis.terms = static_cast<int>(in.most);
  for (int64_t r = 0; r < in.most; ++r) {
    p.of.basis.tensors[r] = in.basis[r].view();
    p.of.basis.rows[r] = in.basis[r].rows;
  }
  p.of.basis.index = in.index.data();
  const int64_t of_index[] = {n * b, b, 1};
  std::copy_n(of_index, 3, p.of.basis.strides);
  p.of.first_source = 1;
  p.of.orders = static_cast<int>(in.orders());
  std::copy(in.a.terms.begin(), in.a.terms.end(), p.of.terms_of);
  p.of.coefficients = in.coefficients.data();
  const int64_t by_target = in.columns, by_source = rows * by_target;
  const int64_t strides[] = {in.most * n * by_source, n * by_source, by_source, by_target,
                             in.a.shared ? 0 : int64_t{1}};
  std::copy_n(strides, 5, p.of.strides);
  return p;
}

Found argmin(const Problem<AffineTerms>& all, const Device& device, int64_t chunk) {
  Found out;
  const bool shared = all.reduce != Reduction::none;
  const int64_t columns = shared ? 1 : all.samples;
  out.cost.assign((all.steps + 1) * all.samples, INFINITY);
  out.parent.assign((all.steps + 1) * columns, -1);
  out.order = out.parent;
  const Best best{{out.cost.data(), true, all.samples, 1},
                  {out.parent.data(), columns, shared ? 0 : 1},
                  {out.order.data(), columns, shared ? 0 : 1}};
  for (int64_t first = 1; first <= all.steps; first += chunk) {
    Host gpu(device);
    Problem<AffineTerms> p = all;
    p.of.first_source = p.begin_source = first;
    p.end_source = std::min(all.steps + 1, first + chunk);
    p.of.basis.index += (first - 1) * p.of.basis.strides[1];
    p.of.coefficients += (first - 1) * p.of.strides[2];
    improve(gpu, p, best, true, [](int64_t, int64_t) {});
    if (gpu.workspace_bytes > kWorkspaceBytes) ++failures, std::printf("workspace too large\n");
  }
  return out;
}

// The winners' candidates, and how they are combined.
void check_combination(AffineInputs& in, const Found& found, const Device& device) {
  const Case& c = in.c;
  const int64_t rows = in.in.rows, samples = c.samples;
  const auto at = [&](int64_t r, int64_t j, int64_t b) { return (r * rows + j) * samples + b; };
  std::vector<int64_t> index(in.most * rows * samples, -1);
  std::vector<double> coefficients(index.size(), NAN);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t k = c.reduce == Reduction::none ? j * samples + b : j;
      for (int r = 0; found.parent[k] >= 0 && r < in.a.terms[found.order[k]]; ++r) {
        if (j % 3 == 2 && r == j % in.a.terms[found.order[k]]) continue;  // left out
        index[at(r, j, b)] = in.row(r, found.parent[k], b);
        coefficients[at(r, j, b)] = in.factor(found.order[k], r, found.parent[k], j, b);
      }
    }
  Combination given{problem_of(in).of.basis, coefficients.data(), {rows * samples, samples, 1}};
  given.basis.index = index.data();
  std::copy_n(given.strides, 3, given.basis.strides);
  Array out(c.dtype, rows, samples, c.outer, c.inner, 1);
  std::fill(out.bytes.begin(), out.bytes.end(), static_cast<char>(0xff));
  Host gpu(device);
  combine(gpu, given, out.view(), in.in.elements(), rows, samples);
  const double rounding = c.dtype == DType::bfloat16  ? 0x1p-8
                          : c.dtype == DType::float16 ? 0x1p-11
                          : c.dtype == DType::float32 ? 0x1p-23
                                                      : 0x1p-52;
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t e = 0; e < in.in.elements(); ++e) {
        long double sum = 0;
        for (int64_t r = 0; r < in.most; ++r)
          if (index[at(r, j, b)] >= 0)
            sum += coefficients[at(r, j, b)] * in.basis[r].get(index[at(r, j, b)], b, e);
        const double difference = std::fabs(out.get(j, b, e) - static_cast<double>(sum));
        if (!(difference <= 6 * rounding)) return expect(false, "cuda", c, "combination");
      }
}

void check_affine(const AffineCase& a, const Device& device) {
  AffineInputs in(a);
  const Problem<AffineTerms> p = problem_of(in);
  const Found one = argmin(p, device, a.c.last);
  in.check(one, "cuda");
  expect(argmin(p, device, a.c.last / 2 + 1) == one, "cuda", a.c, "chunks differ, affine");
  check_combination(in, one, device);
  // The same values where no row is aligned: other kernels, equal bits.
  AffineInputs moved = in;
  const auto shift = [](Array& array) {
    const int64_t size = size_of(array.dtype);
    array.bytes.insert(array.bytes.begin(), size, static_cast<char>(0xff));
    ++array.shift;
  };
  for (Array& array : moved.basis) shift(array);
  shift(moved.in.teacher);
  expect(argmin(problem_of(moved), device, a.c.last) == one, "cuda", a.c, "other rows differ");
}

// The orders beside it change no bit of an order.
void check_orders() {
  const Case c{9, 2, 1, 300, 1, DType::float32, DType::float32, 2, Reduction::none};
  AffineInputs in({c, {2, 4, 3, 6}, false});
  const Problem<AffineTerms> p = problem_of(in);
  const Found one = argmin(p, devices[1], c.last);
  std::vector<double> least(one.cost.size(), INFINITY);
  for (int64_t o = 0; o < in.orders(); ++o) {
    Problem<AffineTerms> alone = p;
    alone.of.orders = 1;
    alone.of.terms_of[0] = in.a.terms[o];
    alone.of.coefficients += o * p.of.strides[0];
    const Found found = argmin(alone, devices[1], c.last);
    for (size_t k = 0; k < least.size(); ++k) least[k] = std::min(least[k], found.cost[k]);
  }
  expect(least == one.cost, "cuda", c, "orders alone differ");
}

// Euler's step as terms: every bit of a step.
void check_euler_terms(const Case& c, const Device& device) {
  AffineInputs in({c, {2}, true});
  Inputs& steps = in.in;
  in.basis = {steps.state, steps.velocity};
  for (int64_t i = 1; i <= c.last; ++i) {
    for (int64_t b = 0; b < c.samples; ++b) in.row(0, i, b) = in.row(1, i, b) = i;
    for (int64_t j = 0; j < i; ++j) {
      in.factor(0, 0, i, j, 0) = 1;
      in.factor(0, 1, i, j, 0) = steps.times[j] - steps.times[i];
    }
  }
  const Outcome expected = whole(steps, device);
  const Found found = argmin(problem_of(in), device, c.last);
  expect(found.cost == expected.cost && found.parent == expected.parent, "cuda", c,
         "Euler's step as terms differs");
}

// All candidates are equal: the largest source wins, of its orders the lowest that is there.
void check_affine_ties(Reduction reduce) {
  const Case c{40, 2, 1, 5, 1, DType::float32, DType::float32, 0, reduce};
  AffineInputs in({c, {3, 1, 2, 2}, true});
  for (int64_t i = 1; i <= c.last; ++i) {
    for (int64_t r = 0; r < in.most; ++r)
      for (int64_t b = 0; b < c.samples; ++b) in.row(r, i, b) = 7;
    for (int64_t o = 0; o < in.orders(); ++o)
      for (int64_t j = 0; j < i; ++j)
        for (int64_t r = 0; r < in.a.terms[o]; ++r) in.factor(o, r, i, j, 0) = r == 0;
  }
  for (Array& array : in.basis)
    for (int64_t b = 0; b < c.samples; ++b)
      for (int64_t e = 0; e < 5; ++e) array.set(7, b, e, 0.5);
  for (int64_t j = 0; j < c.last; ++j) {
    in.factor(0, 0, 40, j, 0) = NAN;                  // order 0 has 39 for its largest
    if (j % 2 == 1) in.factor(1, 0, 40, j, 0) = NAN;  // order 1 too, for odd targets
    for (int64_t o = 0; j >= 30 && o < 4; ++o) in.factor(o, 0, 40, j, 0) = NAN;
  }
  for (const int64_t chunk : {int64_t{40}, int64_t{17}, int64_t{39}}) {
    const Found found = argmin(problem_of(in), devices[1], chunk);
    for (int64_t j = 0; j < 38; ++j)
      for (size_t b = 0; b < found.parent.size() / in.in.rows; ++b) {
        const size_t at = j * (found.parent.size() / in.in.rows) + b;
        const int64_t parent = j < 30 ? 40 : 39, order = j >= 30 ? 0 : j % 2 == 1 ? 2 : 1;
        expect(found.parent[at] == parent && found.order[at] == order, "cuda", c,
               "a tie of candidates went to another");
      }
  }
}

}  // namespace

int main() {
  const DType f32 = DType::float32, f64 = DType::float64, f16 = DType::float16,
              bf16 = DType::bfloat16;
  const std::pair<DType, DType> dtypes[] = {{f32, f32},   {f64, f64},  {f16, f16},
                                            {bf16, bf16}, {f32, bf16}, {f32, f16}};
  // N, B, D = outer x inner, step, samples of the mask, unused elements before the first.
  const int64_t shapes[][7] = {{1, 1, 1, 1, 1, 0, 0},   {2, 2, 1, 7, 1, 2, 0},
                               {9, 3, 1, 255, 1, 1, 1}, {33, 1, 1, 257, 1, 0, 0},
                               {40, 2, 8, 64, 1, 2, 0}, {12, 2, 5, 30, 3, 0, 1}};
  const std::vector<int> orders[] = {{2, 3, 4}, {1}, {6, 4, 2, 1}, {5, 1}, {3, 3}, {4}, {6}};
  const Reduction reductions[] = {Reduction::none, Reduction::mean, Reduction::log_mean};
  int cases = 0, turn = 0;
  for (const auto& [n, b, outer, inner, step, mask, shift] : shapes) {
    ++turn;  // every dtype meets every reduction, every shape too
    for (const auto& [dtype, velocity] : dtypes) {
      const Reduction reduce = reductions[(cases + turn) % 3];
      const Case c{n, b, outer, inner, step, dtype, velocity, mask, reduce};
      const Device& device = devices[cases % 4];
      check(c, shift, device);
      Case few = c;  // just more sources than a tile has
      few.last = std::min<int64_t>(n, 17);
      check_euler_terms(few, device);
      check_affine({few, orders[cases % 7], cases % 2 == 0, shift}, device);
      ++cases;
    }
  }
  for (const DType dtype : {f32, f64, f16, bf16})  // aligned rows, every kernel
    for (const std::vector<int>& terms : {std::vector{6, 4, 2, 1}, std::vector{3, 5}}) {
      const Case c{5, 2, 8, 64, 1, dtype, dtype, 2, reductions[++turn % 3]};
      check_affine({c, terms, false}, devices[1]);
    }
  for (const auto& [dtype, velocity] : dtypes)  // a block goes through its stages several times
    for (const int64_t unaligned : {0, 3}) {
      const Case c{7,     1,        1, 7 * kUnit + unaligned,  1,
                   dtype, velocity, 0, reductions[++turn % 3]};
      for (const int shared : {kSharedBytes, kRoomyBytes}) check(c, 0, {1, shared});
      check_affine({c, orders[turn % 7], true}, {1, kSharedBytes});
    }
  check_orders();
  for (const Reduction reduce : reductions) check_affine_ties(reduce);
  check_ties();
  check_flushes();
  check_tiles();
  check_plans();
  std::printf("%d cases of the CUDA kernels on the host, %d failures\n", cases, failures);
  return failures != 0;
}
