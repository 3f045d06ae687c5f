// The CUDA kernels on the host (tests/cuda_on_host.h), against the definition in long double: all
// storage types, alignments, strides, masks, reductions, ties, NaN, chunks in place, groups of
// samples. And the choice of tiles and splits over a sweep of shapes and devices. `make sanitize`
// runs it.

#include <type_traits>

#include "cuda/step.h"
#include "tests/cases.h"

using namespace oss::cuda;
using namespace oss::tests;
using oss::DType;
using oss::Reduction;
using oss::Tensor3;

namespace {

const Device devices[] = {{108}, {132}, {148}, {20}};  // A100, H200, B200, laptop

// A device whose memory is the host's; workspaces start as NaN.
class Host {
 public:
  explicit Host(const Device& device) : device_(device) {}

  const Device& device() const { return device_; }

  void* allocate(int64_t bytes) {
    workspace_bytes += bytes;
    memory_.emplace_back(bytes + 16, static_cast<char>(0xff));
    const auto address = reinterpret_cast<uintptr_t>(memory_.back().data());
    return reinterpret_cast<void*>((address + 15) / 16 * 16);
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Grid& grid, int threads, int64_t shared_bytes,
              const std::common_type_t<Args>& args) {
    host::Block block;
    block.body = [&] { kernel(args); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          host::run_block(block, threads, shared_bytes);
        }
  }

  int64_t workspace_bytes = 0;

 private:
  const Device device_;
  std::vector<std::vector<char>> memory_;
};

Problem problem_of(Inputs& in) {
  Problem p{};
  p.steps = in.c.last, p.samples = in.c.samples, p.elements = in.elements();
  p.state = in.state.view(), p.velocity = in.velocity.view(), p.teacher = in.teacher.view();
  p.times = in.times.data();
  if (!in.mask.empty())
    p.mask = {reinterpret_cast<const bool*>(in.mask.data()), in.c.mask_samples,
              in.c.mask_samples > 1};
  p.first_source = 0, p.begin_source = 1, p.end_source = in.rows, p.reduce = in.c.reduce;
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
  step(gpu, problem_of(in), {out.cost.data(), true, in.c.samples, 1}, parents, next.view(), false);
  out.next = next.bytes;
  if (workspace != nullptr) *workspace = gpu.workspace_bytes;
  return out;
}

Outcome in_chunks(const Inputs& inputs, const Device& device, int64_t chunk) {
  Inputs in = inputs;
  Outcome out;
  out.cost.assign(in.rows * in.c.samples, INFINITY);
  const Parents parents = parents_of(out.parent, in.c);
  const Problem all = problem_of(in);
  for (int64_t first = 1; first < in.rows; first += chunk) {
    Host gpu(device);
    Problem p = all;
    p.first_source = p.begin_source = first;
    p.end_source = std::min(in.rows, first + chunk);
    p.velocity.rows.data += first * p.velocity.rows.row_stride;
    step(gpu, p, {out.cost.data(), true, in.c.samples, 1}, parents, in.state.view(), true);
  }
  out.next = in.state.bytes;
  return out;
}

// The step from its pieces: all costs, the argmin over them, the advance.
Outcome in_pieces(Inputs& in, const Device& device) {
  Host gpu(device);
  const Problem p = problem_of(in);
  std::vector<double> cost(in.rows * in.rows * in.c.samples, NAN);
  means(gpu, p, cost.data());
  Outcome out;
  out.cost.assign(in.rows * in.c.samples, NAN);
  const Parents parents = parents_of(out.parent, in.c);
  const OfferedCosts given{cost.data(), in.rows * in.c.samples, in.c.samples,
                           1,           in.c.samples,           in.c.reduce};
  select_costs(gpu, given, in.rows, {out.cost.data(), true, in.c.samples, 1}, parents);
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
  expect(in_chunks(in, device, 3) == one, "cuda", c, "chunks of 3 differ");
}

// Equal sources tie, and the largest wins, also of another thread, warp or chunk; NaN and inf never
// do. Sample 1 has no finite source.
void check_ties() {
  const Case c{300, 2, 1, 5, 1, DType::float32, DType::float32, 0, Reduction::none};
  Inputs in(c);
  std::fill(in.times.begin(), in.times.end(), 0.0);  // of no consequence: all velocities are 0
  for (int64_t i = 0; i < in.rows; ++i)
    for (int64_t e = 0; e < 5; ++e) {
      in.state.set(i, 0, e, in.state.get(0, 0, e));
      in.velocity.set(i, 0, e, 0);
      in.velocity.set(i, 1, e, NAN);
    }
  in.state.set(300, 0, 3, NAN), in.state.set(299, 0, 4, INFINITY), in.velocity.set(298, 0, 0, NAN);
  const Device& device = devices[1];
  for (const Outcome& out : {whole(in, device), in_pieces(in, device), in_chunks(in, device, 128)})
    for (int64_t j = 0; j < in.rows; ++j) {
      const int64_t expected = j < 297 ? 297 : -1;
      expect(out.parent[j * 2] == expected, "cuda", c, "a tie went to another than the largest");
      expect(out.parent[j * 2 + 1] == -1, "cuda", c, "a source that is not finite won");
    }
}

// Long rows: the sums are flushed, and splits end in the middle of everything.
void check_flushes() {
  const Case c{3,
               1,
               1,
               kChunk * (kFlushChunks + 9) + 5,
               1,
               DType::float32,
               DType::float32,
               0,
               Reduction::none};
  check(c, 0, {1});
}

void check_plans() {
  int plans = 0;
  for (const Device& device : devices)
    for (const int64_t steps : {1, 2, 33, 100, 200, 500, 1000, 1024})
      for (const int64_t elements : {1, 7, 255, 4096, 262144, 4838400})
        for (const int64_t samples : {1, 16, 4096, 100000})
          for (const Tile& tile : {kTile<float>, kTile<double>}) {
            const Plan plan = plan_cost(steps, samples, elements, tile, device);
            const Plan alone = plan_cost(steps, 1, elements, tile, device);
            const Case c{steps, samples, 1, elements, tile.sources, {}, {}, 0, Reduction::none};
            expect(plan.splits >= 1 && plan.splits <= 65535, "plan", c, "splits");
            expect(plan.splits <= ceil_div(elements, kChunk), "plan", c, "an empty split");
            expect(plan.splits == alone.splits, "plan", c, "splits depend on the samples");
            expect(plan.samples >= 1 && plan.samples <= samples, "plan", c, "samples");
            expect(workspace_bytes(plan) <= kWorkspaceBytes, "plan", c,
                   "the workspace is too large");
            expect(plan.why != nullptr, "plan", c, "no reason");
            int64_t tiles = 0, cells = 0;  // counted one by one
            for (int64_t i = 1; i <= steps; i += tile.sources)
              for (int64_t j = 0; j < std::min(steps, i + tile.sources - 1); j += tile.targets)
                ++tiles;
            for (int64_t i = 1; i <= steps; ++i) cells += i;
            expect(plan.tiles == tiles && plan.cells == cells, "plan", c, "tiles or cells");
            ++plans;
          }
  std::printf("%d plans\n", plans);
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
  const Reduction reductions[] = {Reduction::none, Reduction::mean, Reduction::log_mean};
  int cases = 0, turn = 0;
  for (const auto& [n, b, outer, inner, step, mask, shift] : shapes) {
    ++turn;  // every dtype meets every reduction, every shape too
    for (const auto& [dtype, velocity] : dtypes) {
      const Reduction reduce = reductions[(cases + turn) % 3];
      check({n, b, outer, inner, step, dtype, velocity, mask, reduce}, shift, devices[cases % 4]);
      ++cases;
    }
  }
  check_ties();
  check_flushes();
  check_plans();
  std::printf("%d cases of the CUDA kernels on the host, %d failures\n", cases, failures);
  return failures != 0;
}
