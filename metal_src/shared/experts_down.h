// experts_down: down projection of every pair and the sum over k = 0 .. K-1, in this order, of weight times product.
//
// kernel                buffers after args                                                                 grid (threadgroups)                  threads
// experts_down_gemv_cN  down [E, H, F]; x float [n K, F]; ids int32 [n K]; weights float [n K];             (ceil(H / experts_down_rows))        gemv_threads
//                       start int32 [E + 1]; pairs int32 [n K]; count; out float [n, H]                     threadgroup 0: n K experts_down_rows floats
//                       N = 1, 4 pairs of an expert in a pass (N = 1 for n = 1, else 4); at most experts_down_most_pairs pairs
// experts_down_gemm     down; x; start; pairs; tiles; tile_count (expert_tiles.h); products float [n K, H]  (ceil(H / gemm_rows), most tiles)    gemm_threads
//                                                                                                          threadgroup 0: gemm_threadgroup_bytes
// experts_down_sum      products float [n K, H]; weights float [n K]; count; out float [n, H]               (ceil(H / experts_down_sum_threads), n)   experts_down_sum_threads
//                       after experts_down_gemm
#pragma once
#include "expert_tiles.h"

namespace ferrum {
namespace shared {

enum { experts_down_rows = 4, experts_down_most_pairs = 2048, experts_down_sum_threads = 256 };

struct ExpertsDownArgs {
  int32_t cols, rows;  // F, H
  uint32_t row_bytes;  // of `down`
  int32_t top_k;       // K
};
static_assert(sizeof(ExpertsDownArgs) == 16, "ExpertsDownArgs is packed");

}  // namespace shared
}  // namespace ferrum
