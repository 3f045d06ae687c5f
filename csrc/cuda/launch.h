// How a step is cut into thread blocks: a pure function of the problem and the device, without CUDA
// headers, so that it is tested where there is no GPU.
//
// The cost pass cuts the triangle of (source, target) pairs into tiles and the elements into
// splits; a block computes one tile over one split. The sums of the splits are added in order, so
// the splits decide the bits of a cost: they depend on the shape and the device only, never on the
// number of samples, the reduction, or the chunk of sources that a call brings.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace oss::cuda {

constexpr int kMaxSteps = 1024;                                // N
constexpr int64_t kMaxElements = (int64_t{1} << 31) - 2 * 64;  // of a sample: counted in an int
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

// Every warp of the cost pass owns a square of pairs and keeps its sums in registers, the lanes
// side by side along the elements. 64 sums, their operands and the addresses take about 150
// registers, of which 384 threads have 168 each; float64 takes two registers a number.
constexpr int kSourceWarps = 3, kTargetWarps = 4;  // of a block
constexpr int kCostThreads = kSourceWarps * kTargetWarps * 32;
template <class T>
constexpr int kPairs = sizeof(T) == 4 ? 8 : 4;  // side of a warp's square
template <class T>
constexpr int kSourceTile = kSourceWarps * kPairs<T>;
template <class T>
constexpr int kTargetTile = kTargetWarps * kPairs<T>;

struct Tile {
  int64_t sources, targets;
};
template <class T>
constexpr Tile kTile = {kSourceTile<T>, kTargetTile<T>};

// Elements are counted in chunks, of two for each lane of a warp. A stage in shared memory is one
// chunk, or two where they fit: then there is one barrier and one set of copies for both. All that
// a block shares must fit the 99 KiB of the smallest card from compute capability 8.0 on.
constexpr int kChunk = 64, kStageChunks = 2;
constexpr int kSharedBytes = 99 << 10;
// A lane adds the squares of this many chunks in its own precision before they go to float64.
constexpr int kFlushChunks = 256;

constexpr int kMaxTerms = 6, kMaxOrders = 4;  // of candidates of any affine form

// How a block of the cost pass is laid out. The warps' squares are as large as ever.
struct Shape {
  int source_warps, target_warps;
  int at_once;       // sources whose operands are in registers together
  int chunks;        // of a stage
  int stages;        // in shared memory
  int stage_bytes;   // of one: targets, first terms, other terms
  int shared_bytes;  // of all, and the coefficients
};

// `first`, `others`, `compute`: bytes of an element of the first term and the target, of the other
// terms, and of a sum.
constexpr Shape shape_of(bool euler, int terms, int first, int others, int compute) {
  Shape out{};
  // A source has rows for all its terms to stage, a target has one: with more terms than Euler's
  // step fewer sources and more targets take less memory for as many pairs.
  out.source_warps = euler ? kSourceWarps : 2;
  out.target_warps = kCostThreads / 32 / out.source_warps;
  // The operands of all eight sources would not fit beside the sums; those of two with as few terms
  // would have the block wait for shared memory.
  out.at_once = terms <= (compute == 4 ? 4 : 3) ? 4 : 2;
  const int pairs = compute == 4 ? kPairs<float> : kPairs<double>;
  const int sources = out.source_warps * pairs, targets = out.target_warps * pairs;
  const int chunk_bytes = kChunk * ((sources + targets) * first + sources * (terms - 1) * others);
  const int coefficients = sources * targets * (euler ? 1 : terms) * compute;
  const int fitting = (kSharedBytes - coefficients) / chunk_bytes;
  // One stage is computed on while the other comes; a third hides the latency of memory behind
  // stages that are short.
  out.chunks = fitting >= 2 * kStageChunks ? kStageChunks : 1;
  out.stages = fitting >= 3 * out.chunks ? 3 : 2;
  out.stage_bytes = out.chunks * chunk_bytes;
  out.shared_bytes = out.stages * out.stage_bytes + coefficients;
  return out;
}

constexpr int kSelectThreads = 128;
// So few blocks that the compiler has 128 registers a thread: it would spill some for more blocks.
constexpr int kAdvanceThreads = 128, kAdvanceBlocks = 4;
constexpr int64_t kMaxSamplesPerLaunch = 32768;  // of gridDim.z

struct Device {
  int multiprocessors;
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

// Tiles with at least one pair, for sources [begin, end).
inline int64_t tiles_of(int64_t begin, int64_t end, const Tile& tile) {
  int64_t tiles = 0;
  for (int64_t source = begin; source < end; source += tile.sources)
    tiles += ceil_div(std::min(end, source + tile.sources) - 1, tile.targets);
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
  const int64_t stages = ceil_div(elements, kStageChunks * kChunk);
  // With s splits a block has stages / s stages and takes about two more to begin and to end. The
  // blocks of one multiprocessor, about s tiles / multiprocessors with four fifths of their pairs
  // busy, end unevenly, half a block late. The sum,
  //     (0.8 s tiles / multiprocessors + 0.5) (stages / s + 2),
  // is least for this s.
  const double tiles = plan.tiles, multiprocessors = device.multiprocessors;
  const double even = std::sqrt(static_cast<double>(stages) * multiprocessors / (3.2 * tiles));
  const int64_t wanted = std::max<int64_t>(1, std::llround(even));
  const int64_t by_memory = kWorkspaceBytes / bytes - 1;  // one part is the objective
  const int64_t splits = std::max<int64_t>(1, std::min({wanted, stages, by_memory}));
  plan.splits = static_cast<int>(splits);
  plan.why = splits == wanted   ? "little is lost at the ends of blocks, and at the end of them all"
             : splits == stages ? "a split is at least one stage of elements"
                                : "the sums of all splits fit the workspace";
  plan.samples =
      std::clamp<int64_t>(by_memory / splits, 1, std::min(samples, kMaxSamplesPerLaunch));
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
