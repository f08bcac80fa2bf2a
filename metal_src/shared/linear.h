// linear: one x by one to three weights of different types, outputs side by side.
//
// kernel           buffers after args                                                        grid (threadgroups)                            threads
// linear_gemv_cN   weight 0 [R_0, C]; weight 1; weight 2; x float [n, C]; count;             (sum of ceil(R_i / gemv_block), ceil(n / N))   gemv_threads
//                  out float [n, R_0 + R_1 + R_2]; N = 1, 2, 4, 8 columns in a pass
// linear_gemm      the same                                                                  (sum of ceil(R_i / gemm_rows), ceil(n / gemm_columns))   gemm_threads
//                                                                                            threadgroup 0: gemm_threadgroup_bytes
// An absent weight has 0 rows; bind any buffer in its place. Plausible rule: linear_gemv with the smallest N >= n for n <= 8, N = 8 for n <= 16, then linear_gemm.
#pragma once
#include "weight_types.h"

namespace ferrum {
namespace shared {

struct LinearArgs {
  int32_t cols;           // C
  int32_t rows[3];        // R_i
  uint32_t row_bytes[3];  // of each weight
};
static_assert(sizeof(LinearArgs) == 28, "LinearArgs is packed");

}  // namespace shared
}  // namespace ferrum
