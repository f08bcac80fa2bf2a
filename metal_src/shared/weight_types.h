// What the kernels that multiply weights have in common.
//
// Function constants, int, all three set for every pipeline whose kernel reads weights (embed, linear, route, experts_gate_up, experts_down):
//   0, 1, 2: weight_type_0, _1, _2: the ggml type ids (core/quant_types.h) of the op's weights in their order; -1 where there is none.
// Alignment of buffers (offsets count): Q4_K and Q5_K weights and all floats in rows of a multiple of 4 columns 16 bytes; Q2_K weights 4, IQ4_XS 8; those of
// other quantized types 2; float weights 4 times their size (their own size where columns are no multiple of 4).
// `count` in the kernels' lists is one int32 of the step buffer, bound by its offset: the rows n of this call. Threadgroups past it do nothing.
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { simdgroup_lanes = 32 };

// Products of few columns: a simdgroup computes gemv_rows rows of a weight, a threadgroup has gemv_simdgroups.
enum { gemv_rows = 2, gemv_simdgroups = 4, gemv_threads = gemv_simdgroups * simdgroup_lanes, gemv_block = gemv_rows * gemv_simdgroups };

// Products of many columns: a threadgroup of four simdgroups computes a tile of gemm_rows rows of a weight by gemm_columns columns.
enum { gemm_rows = 64, gemm_columns = 32, gemm_depth = 32, gemm_threads = 128 };
enum { gemm_stride = gemm_depth + 4 };  // floats: rows of a tile start in different banks
enum { gemm_threadgroup_bytes = 4 * (gemm_rows + gemm_columns) * gemm_stride };

}  // namespace shared
}  // namespace ferrum
