// How a step is cut into thread blocks: a pure function of the problem and the device, without CUDA
// headers, so that it is tested where there is no GPU.
//
// The cost pass cuts the triangle of (source, target) pairs into tiles and the elements into
// splits; a block computes one tile over one split. The sums of the splits are added in a fixed
// order, so the splits decide the bits of a cost: they depend on the shape and the device only,
// never on the number of samples, the reduction, or the chunk of sources that a call brings.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace oss::cuda {

constexpr int kMaxSteps = 1024;                              // N
constexpr int64_t kMaxElements = (int64_t{1} << 31) - 1024;  // of a sample: counted in an int
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

// Every warp of the cost pass owns a square of pairs and keeps its sums in registers, the lanes
// side by side along the elements. 64 sums, their operands and the addresses take about 160
// registers, of which 384 threads have 168 each; float64 takes two registers a number.
constexpr int kCostWarps = 12;  // of a block
constexpr int kCostThreads = kCostWarps * 32;

// The part of the triangle that is a block's, in squares. Sources are cut into bands from the last
// one down, so that the band which is not full lies where the triangle is narrow. At its right end,
// the diagonal, a band has stairs one square wide: the tile there takes as many columns more as
// stairs leave warps without a square. The other tiles are rectangles.
struct Tile {
  int pairs;             // side of a square
  int rows;              // squares of sources, of a band
  int columns;           // squares of targets
  int diagonal;          // likewise, of the tile at the diagonal
  int sources, targets;  // how many there are at most
};

// `compute`: bytes of a sum. A source has rows for all its terms to stage, a target has one: with
// more terms than Euler's step fewer sources and more targets take less memory for as many pairs.
constexpr Tile tile_of(bool euler, int compute) {
  const int pairs = compute == 4 ? 8 : 4;
  const int rows = euler ? 3 : 2, stairs = rows * (rows - 1) / 2;
  const int diagonal = (kCostWarps + stairs) / rows;
  return {pairs, rows, kCostWarps / rows, diagonal, rows * pairs, diagonal * pairs};
}

// Elements are counted in chunks, of two for each lane of a warp. Splits are whole units, of which
// the last may end beyond the elements.
constexpr int kChunk = 64, kUnit = 2 * kChunk;
// What a block may share: on the smallest card from compute capability 8.0 on, and on those of data
// centres from 9.0 on, where longer stages have fewer barriers.
constexpr int kSharedBytes = 99 << 10, kRoomyBytes = 227 << 10;
// A lane adds the squares of its share of as many elements in its own precision before they go to
// float64.
constexpr int kFlushElements = 128 * kUnit;

constexpr int kMaxTerms = 6, kMaxOrders = 4;  // of candidates of any affine form

// How a block of the cost pass is laid out.
struct Shape {
  Tile tile;
  int together;      // chunks whose operands are in registers together
  int length;        // elements of a stage
  int stages;        // in shared memory
  int stage_bytes;   // of one: targets, first terms, other terms
  int shared_bytes;  // of all, and the coefficients
};

// `first`, `others`, `compute`: bytes of an element of the first term and the target, of the other
// terms, and of a sum.
constexpr Shape shape_of(bool euler, int terms, int first, int others, int compute, bool roomy) {
  Shape out{};
  out.tile = tile_of(euler, compute);
  // Two chunks share the load of a coefficient, but those of more terms take too much memory.
  out.together = terms <= 2 && compute == 4 ? 2 : 1;
  const int rows = out.tile.sources + out.tile.targets;
  const int element_bytes = rows * first + out.tile.sources * (terms - 1) * others;
  const int squares = kCostWarps * out.tile.pairs * out.tile.pairs;
  const int coefficients = squares * (euler ? 1 : terms) * compute;
  const int fitting = ((roomy ? kRoomyBytes : kSharedBytes) - coefficients) / element_bytes;
  // One stage is computed on while the other comes; a third hides the latency of memory behind
  // stages that are short. Long ones have one barrier and one set of copies for more work.
  out.length = fitting >= 4 * kUnit ? 2 * kUnit : fitting >= 2 * kUnit ? kUnit : kChunk;
  out.stages = fitting >= 3 * out.length ? 3 : 2;
  out.stage_bytes = out.length * element_bytes;
  out.shared_bytes = out.stages * out.stage_bytes + coefficients;
  return out;
}

constexpr int kSelectThreads = 128;
// So few blocks that the compiler has 128 registers a thread: it would spill some for more blocks.
constexpr int kAdvanceThreads = 128, kAdvanceBlocks = 4;
constexpr int64_t kMaxSamplesPerLaunch = 32768;  // of gridDim.z
constexpr int64_t kMaxSplits = 8192;             // whose sums a block of pair_cost_kernel shares

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

struct Plan {
  int tiles;        // of the whole triangle
  int splits;       // of the elements
  int64_t cells;    // pairs of the whole triangle
  int64_t samples;  // of one launch
  const char* why;  // what decided the splits
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pairs (i, j < i) of the sources [begin, end).
inline int64_t cells_of(int64_t begin, int64_t end) {
  return end <= begin ? 0 : (end * (end - 1) - begin * (begin - 1)) / 2;
}

// Tiles of the band of sources that ends before `end`.
inline int64_t tiles_of_band(int64_t end, const Tile& tile) {
  const int64_t columns = ceil_div(end - 1, tile.pairs);
  return 1 + ceil_div(std::max<int64_t>(0, columns - tile.diagonal), tile.columns);
}

// Tiles for sources [begin, end).
inline int64_t tiles_of(int64_t begin, int64_t end, const Tile& tile) {
  int64_t tiles = 0;
  for (; end > begin; end -= tile.sources) tiles += tiles_of_band(end, tile);
  return tiles;
}

// The bytes beside the outputs: sums of all splits and samples of a launch, and with a reduction
// one objective per pair.
inline int64_t workspace_bytes(const Plan& plan) {
  return (plan.splits * plan.samples + 1) * plan.cells * static_cast<int64_t>(sizeof(double));
}

// `steps` is N.
inline Plan plan_cost(int64_t steps, int64_t samples, int64_t elements, const Tile& tile,
                      const Device& device) {
  Plan plan{};
  plan.cells = cells_of(1, steps + 1);
  plan.tiles = static_cast<int>(tiles_of(1, steps + 1, tile));
  const int64_t bytes = plan.cells * static_cast<int64_t>(sizeof(double));
  const int64_t units = ceil_div(elements, kUnit);
  const int64_t by_memory = kWorkspaceBytes / bytes - 1;  // one part is the objective
  const int64_t most = std::clamp<int64_t>(std::min(by_memory, kMaxSplits), 1, units);
  // With s splits a block has units / s units and takes about as long as one and a half more to
  // begin and to end. Multiprocessors compute one block after the other: few blocks in as many
  // rounds as it takes, whole ones; many, of whose warps nine tenths are busy on average, end
  // unevenly, half a block late.
  const auto time_of = [&](int64_t splits) {
    const double rounds = static_cast<double>(splits * plan.tiles) / device.multiprocessors;
    return std::max(1.0, std::min(std::ceil(rounds), 0.9 * rounds + 0.5)) *
           (static_cast<double>(units) / static_cast<double>(splits) + 1.5);
  };
  double least = time_of(1);
  plan.splits = 1;
  const auto consider = [&](int64_t wanted) {
    const int64_t splits = std::clamp<int64_t>(wanted, 1, most);
    const double time = time_of(splits);
    if (time >= least) return;
    least = time;
    plan.splits = static_cast<int>(splits);
  };
  for (int64_t rounds = 1; rounds <= 4; ++rounds)
    consider(rounds * device.multiprocessors / plan.tiles);
  consider(std::llround(std::sqrt(static_cast<double>(units) * device.multiprocessors /
                                  (2.7 * plan.tiles))));  // least for many rounds
  plan.why = plan.splits < most   ? "least is lost at the ends of blocks, and of them all"
             : most == units      ? "a split is at least one unit of elements"
             : most == kMaxSplits ? "a block can share the sums of all splits"
                                  : "the sums of all splits fit the workspace";
  plan.samples =
      std::clamp<int64_t>(by_memory / plan.splits, 1, std::min(samples, kMaxSamplesPerLaunch));
  return plan;
}

// Targets that one block of the advance walks through. In place it walks through all of them,
// because a row may be written only after the rows below it have read it.
inline int64_t targets_per_block(int64_t targets, int64_t columns, int64_t samples, bool in_place,
                                 const Device& device) {
  if (in_place) return targets;
  const int64_t blocks = ceil_div(columns, kAdvanceThreads) * samples;
  const int64_t wanted = 8 * static_cast<int64_t>(device.multiprocessors);
  const int64_t groups = std::clamp<int64_t>(ceil_div(wanted, blocks), 1, targets);
  return ceil_div(targets, groups);
}

}  // namespace oss::cuda
