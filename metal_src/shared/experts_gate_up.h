// experts_gate_up: silu(gate x) * (up x) of every (token, expert) pair; row of a pair = token * K + k.
// weight_type_0 is gate's, weight_type_1 up's.
//
// kernel                    buffers after args                                                                   grid (threadgroups)                         threads
// experts_gate_up_gemv_cN   gate [E, F, H]; up [E, F, H]; x float [n, H]; ids int32 [n K]; start int32 [E + 1];   (ceil(F / gemv_block), n K)                 gemv_threads
//                           pairs int32 [n K]; count; out float [n K, F]; N = 1, 4 pairs of an expert in a pass (N = 1 for n = 1, else 4)
// experts_gate_up_gemm      gate; up; x; start; pairs; tiles; tile_count (expert_tiles.h); out                    (ceil(F / (gemm_rows / 2)), most tiles)     gemm_threads
//                                                                                                                threadgroup 0: gemm_threadgroup_bytes
// Plausible rule for both experts' ops: the gemv for n <= 32, then the gemm.
#pragma once
#include "expert_tiles.h"

namespace ferrum {
namespace shared {

struct ExpertsGateUpArgs {
  int32_t cols, rows;       // H, F
  uint32_t gate_row_bytes, up_row_bytes;
  int32_t top_k;            // K
};
static_assert(sizeof(ExpertsGateUpArgs) == 20, "ExpertsGateUpArgs is packed");

}  // namespace shared
}  // namespace ferrum
