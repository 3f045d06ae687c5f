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

constexpr int kMaxTerms = 6;
constexpr int kMaxOrders = 4;

// Sources packed together, with the rows of all their terms: 4 of state and velocity (8 KiB) stay
// in the first-level cache, together with a tile of targets, even where two hardware threads share
// it. A source is packed once, whatever the number of its orders.
constexpr int64_t kSourceGroup = 4;
constexpr int64_t kScratchRows = 2 * kSourceGroup;
// Tiles may compute on up to this many rows past the last target; `times` is padded as far.
constexpr int64_t kMaxTile = 16;

static inline int64_t group_of(int64_t terms) {
  return terms <= 2 ? kSourceGroup : kScratchRows / terms;
}

// D elements, cut into blocks; segment s is a fixed run of blocks with partial sums of its own.
struct Segments {
  int64_t elements;
  int64_t blocks;
  int64_t count;
};

// The candidates of a (source, order), here called a pair: the sum of its terms, each a coefficient
// for the target times a row of the basis.
struct Pair {
  int64_t source;
  int32_t order, terms;
  int64_t rows[kMaxTerms];  // of each basis; alike in all pairs of a source, but for the terms
  int64_t cells;            // where its cells (targets 0 .. source-1) begin in a slab
  int64_t coefficients;     // where those of its first term begin; those of the next follow
};

// Coefficients of one term of a pair, those past the last target included that a tile reads.
static inline int64_t coefficients_of(const Pair& pair) { return pair.source + kMaxTile / 2; }

struct CostJob {
  int terms;  // the most that a pair has
  Rows basis[kMaxTerms];
  Rows target;
  Segments segments;
  const Pair* pairs;         // live ones, by ascending source
  const double* times;       // padded by kMaxTile. Euler's step: coefficients 1 and t[j] - t[i]
  const void* coefficients;  // or these, of the compute type; null for Euler's step
  double* slabs;             // [segments, slab_size]: sums of squares
  int64_t slab_size;
};

// What targets without a row get.
enum class Absent { untouched, kept, zero };

struct AdvanceJob {
  int terms;
  Rows basis[kMaxTerms];
  Rows target;  // data == nullptr: no cost wanted
  Rows next;    // dense; may be basis[0] itself, of whose rows a target reads larger ones only.
                // data == nullptr: no candidates wanted
  Absent absent;  // kept: as in basis[0]
  bool streamed;  // next is larger than the caches: written past them
  Segments segments;
  int64_t targets;
  const int64_t* rows;         // [targets, terms], of each basis; -1: the term is left out
  const double* coefficients;  // [targets, terms]
  double* sums;                // [segments, targets]: sums of squares of the chosen pairs
};

struct Kernels {
  const char* name;
  // Sums of squares of one segment for the pairs [begin, end), into their cells of that slab.
  void (*cost)(const CostJob& job, int64_t segment, int64_t begin, int64_t end, void* scratch,
               int64_t scratch_bytes);
  // The candidates that `rows` names, for one segment of the elements, targets ascending.
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
