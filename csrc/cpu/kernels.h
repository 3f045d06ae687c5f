// The contract between the driver (step.h) and the inner loops (loops.h), which are compiled once
// per instruction set. Plain data only: no torch, and nothing from the standard library that is
// inline, because the linker keeps one copy of an inline function and could give the AVX-512 one to
// everybody.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensors.h"

namespace oss {
// The instruction set in use, chosen at first use: the best that the machine has and the library
// was built with, or the value of the environment variable OSS_CPU_CAPABILITY. Throws
// std::runtime_error if that names one that is not available.
const char* cpu_capability();
}  // namespace oss

namespace oss::cpu {

// Elements are summed in the compute type within a block, in float64 across blocks. The size is
// part of the definition of the bits of a cost, so it is the same for every instruction set and
// tile shape.
constexpr int64_t kBlockBytes = 1024;
template <class T>
constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(T));

// Sources packed together: 4 rows of state and velocity (8 KiB) stay in the first-level cache,
// together with a tile of targets, even where two hardware threads share it.
constexpr int64_t kSourceGroup = 4;
constexpr int64_t kScratchRows = 2 * kSourceGroup;
// Tiles may compute on up to this many rows past the last target; `times` is padded as far.
constexpr int64_t kMaxTile = 16;

// D elements, cut into blocks; segment s is a fixed run of blocks with partial sums of its own.
struct Segments {
  int64_t elements;
  int64_t blocks;
  int64_t count;
};

struct CostJob {
  Rows state, velocity, teacher;
  int64_t first_source;  // row 0 of velocity belongs to this source
  const double* times;   // padded by kMaxTile
  Segments segments;
  const int64_t* live;     // live sources, ascending, all >= 1
  const int64_t* offsets;  // source live[l] has its cells (targets 0 .. live[l]-1) at offsets[l]
  double* slabs;           // [segments, slab_size]: sums of squares
  int64_t slab_size;
};

struct AdvanceJob {
  Rows state, velocity;
  Rows teacher;  // data == nullptr: no cost wanted
  Rows next;     // dense; may be the state itself
  bool in_place;
  int64_t first_source;
  const double* times;
  Segments segments;
  int64_t targets;
  const int64_t* parent;  // -1: keep the row
  double* sums;           // [segments, targets]: sums of squares of the chosen pairs
};

struct Kernels {
  const char* name;
  // Sums of squares of one segment for the live sources [begin, end), into their cells of that
  // slab.
  void (*cost)(const CostJob& job, int64_t segment, int64_t begin, int64_t end, void* scratch,
               int64_t scratch_bytes);
  // The candidates that `parent` names, for one segment of the elements, targets ascending.
  void (*advance)(const AdvanceJob& job, int64_t segment);
};

// Blocks of a segment: [first_block(s), first_block(s + 1)).
static inline int64_t first_block(const Segments& segments, int64_t segment) {
  return segments.blocks * segment / segments.count;
}

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace oss::cpu
