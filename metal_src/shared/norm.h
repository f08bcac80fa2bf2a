// norm: residual += delta, then residual / rms(residual) * weight.
//
// kernel  buffers after args                                                                    grid (threadgroups)  threads              threadgroup 0
// norm    residual float [n, H], updated; delta float [n, H], any buffer where there is none;   (n)                  norm_threads(cols)   norm_threadgroup_bytes
//         weight float [H]; count; out float [n, H]
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { norm_most_threads = 512, norm_threadgroup_bytes = 128 };

struct NormArgs {
  int32_t cols;  // H
  float eps;
  int32_t has_delta;
};
static_assert(sizeof(NormArgs) == 12, "NormArgs is packed");

/// A function of the row's size alone, as the order of additions is.
inline int32_t norm_threads(int32_t cols) {
  const int32_t threads = (cols / 4 + 31) / 32 * 32;
  return threads < 32 ? 32 : threads < norm_most_threads ? threads : norm_most_threads;
}

}  // namespace shared
}  // namespace ferrum
