// The list of tiles of the grouped products, which `route` writes.
//
// tiles: int32 [most, 2] of {expert, first}: the pairs at positions first .. min(first + expert_tile_pairs, start[expert + 1]) - 1 of `pairs`.
// tile_count: int32 [1]. Every pair is in exactly one tile; tiles of experts without pairs are not listed.
#pragma once
#include "weight_types.h"

namespace ferrum {
namespace shared {

enum { expert_tile_pairs = gemm_columns };

/// The grid's bound: most tiles that `pairs` (token, expert) pairs of `experts` experts can have.
inline int32_t most_expert_tiles(int32_t pairs, int32_t experts) {
  const int32_t groups = pairs / expert_tile_pairs + experts;
  return groups < pairs ? groups : pairs;
}

}  // namespace shared
}  // namespace ferrum
