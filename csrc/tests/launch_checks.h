// How a step is cut into tiles and splits, over a sweep of shapes and devices.
#pragma once

#include "tests/cases.h"
#include "tests/cuda_device.h"

namespace oss::cuda {

using tests::Case;
using tests::expect;

// Every pair is one warp's, of one tile of those that are launched.
inline void check_tiles() {
  for (const bool euler : {true, false})
    for (const int compute : {4, 8})
      for (const int end : {2, 3, 9, 24, 25, 26, 34, 41, 101, 201, 513, 1025})
        for (const int begin : {1, end / 2, end - end / 3, end - 1}) {
          const Tile tile = tile_of(euler, compute);
          const Case c{end - 1, begin, 1, 1, tile.rows, {}, {}, 0, Reduction::none};
          std::vector<int> owners(end * end, 0);
          const int tiles = static_cast<int>(tiles_of(begin, end, tile));
          for (int index = 0; index < tiles; ++index) {
            const TileAt at = tile_at(end, tile, index);
            expect(at.target >= 0 && at.columns > 0 && at.columns * tile.pairs <= tile.targets,
                   "tiles", c, "columns");
            for (int warp = 0; warp < kCostWarps; ++warp) {
              const SquareAt my = square_at(begin, tile, at, warp);
              for (int s = 0; my.any && s < tile.pairs; ++s)
                for (int t = 0; t < tile.pairs; ++t) {
                  const int i = at.source + my.source + s, j = at.target + my.target + t;
                  if (i >= begin && j < i) ++owners.at(i * end + j);
                }
            }
          }
          for (int i = 0; i < end; ++i)
            for (int j = 0; j < end; ++j)
              expect(owners[i * end + j] == (i >= begin && j < i), "tiles", c,
                     "a pair without a warp, or with several");
        }
}

inline void check_plans() {
  int plans = 0;
  for (const Device& device : devices)
    for (const int64_t steps : {1, 2, 33, 100, 200, 500, 1000, 1024})
      for (const int64_t elements : {int64_t{1}, int64_t{255}, int64_t{4096}, int64_t{262144},
                                     int64_t{4838400}, kMaxElements})
        for (const int64_t samples : {1, 16, 4096, 100000})
          for (const Tile& tile : {tile_of(true, 4), tile_of(true, 8)}) {
            const Plan plan = plan_cost(steps, samples, elements, tile, device);
            const Plan alone = plan_cost(steps, 1, elements, tile, device);
            const Case c{steps, samples, 1, elements, tile.sources, {}, {}, 0, Reduction::none};
            expect(plan.splits >= 1 && plan.splits <= kMaxSplits, "plan", c, "splits");
            expect(plan.splits <= ceil_div(elements, kUnit), "plan", c, "an empty split");
            expect(plan.splits == alone.splits, "plan", c, "splits depend on the samples");
            expect(plan.samples >= 1 && plan.samples <= samples, "plan", c, "samples");
            expect(workspace_bytes(plan) <= kWorkspaceBytes, "plan", c,
                   "the workspace is too large");
            expect(plan.why != nullptr, "plan", c, "no reason");
            int64_t cells = 0;  // counted one by one
            for (int64_t i = 1; i <= steps; ++i) cells += i;
            expect(plan.cells == cells, "plan", c, "cells");
            ++plans;
          }
  std::printf("%d plans\n", plans);
}

}  // namespace oss::cuda
