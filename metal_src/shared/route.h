// route: logits of all experts, softmax over them, the K largest (of equal ones the lowest expert first, NaN as -inf), optional renormalisation,
// and the pairs p = row * K + k grouped by expert with the tiles of the grouped products.
//
// kernel              buffers after args                                                              grid (threadgroups)   threads        threadgroup 0
// route_and_group_rR  router [E, H] of any type; x float [n, H]; count; ids int32 [n K];              (1)                   route_threads  route_threadgroup_bytes
//                     weights float [n K]; start int32 [E + 1]; pairs int32 [n K];
//                     tiles; tile_count (expert_tiles.h)
// route_rR            the same; start, pairs, tiles and tile_count are not touched                    (ceil(n / R))         route_threads  route_threadgroup_bytes
// route_group         ids; count; start; pairs; tiles; tile_count                                     (1)                   route_threads  route_threadgroup_bytes
//
// Few rows: `route_and_group` does everything in one dispatch. Many: `route`, then `route_group`. R = 1, 4 rows of a pass over the router. The ids and
// weights of a row are the same either way. Plausible rule: R = 1 for n = 1, else 4; one dispatch for n <= 32.
// Function constants: those of weight_types.h for `route` and `route_and_group`.
// E <= route_most_experts, K <= route_most_top_k.
#pragma once
#include "expert_tiles.h"

namespace ferrum {
namespace shared {

enum { route_threads = 512, route_most_rows = 4, route_most_experts = 1024, route_most_top_k = 64 };

struct RouteArgs {
  int32_t cols, experts, top_k;  // H, E, K
  uint32_t row_bytes;            // of the router
  int32_t normalize;             // the K weights of a row sum to 1
};
static_assert(sizeof(RouteArgs) == 20, "RouteArgs is packed");

/// Logits of route_most_rows rows, or counts and starts of the grouping.
inline int32_t route_threadgroup_bytes(int32_t experts) {
  const int32_t padded = (experts + 31) / 32 * 32, logits = route_most_rows * padded, counts = (padded < route_threads ? static_cast<int32_t>(route_threads) : padded) + padded;
  return 4 * (logits < counts ? counts : logits);
}

}  // namespace shared
}  // namespace ferrum
