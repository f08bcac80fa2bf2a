// What kernels over rows of floats share: exponentials that take any argument, floats that order as integers, sums of a threadgroup.
#pragma once
#include <metal_stdlib>
#include "shared/integers.h"

using namespace metal;

namespace ferrum {

/// Below every score that a model makes, and far enough from the end of the range that differences of scores are finite.
constant float lowest_score = -1.0e38f;

/// exp(x) for x <= 0; NaN stays NaN. Below -87 it is 0: not left to exp, whose fast form need not take arguments of any size.
inline float exp_below_zero(float x) { return x < -87.0f ? 0.0f : precise::exp(x); }

enum : uint { key_of_nothing = 0x007fffffu };  // of -inf

/// Rises as the float does; both zeros are one, and NaN is as -inf. Never 0.
inline uint ordered_key(float value) {
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return key_of_nothing;
  if (bits == 0x80000000u) return 0x80000000u;
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
inline bool is_nan(float value) { return (as_type<uint>(value) & 0x7fffffffu) > 0x7f800000u; }

/// Sum of the values of lanes before this one.
inline int sum_of_lower_lanes(int value, ushort lane) {
  int sum = value;
  for (ushort step = 1; step < 32; step *= 2) {
    const int other = simd_shuffle(sum, ushort(lane >= step ? lane - step : lane));
    sum += lane >= step ? other : 0;
  }
  return sum - value;
}

/// Sum over a threadgroup of at most 32 simdgroups, which every thread gets; `memory` holds one float of each simdgroup.
inline float sum_of_threadgroup(float value, threadgroup float* memory, ushort lane, ushort simdgroup_index, ushort simdgroups) {
  const float sum = simd_sum(value);
  if (lane == 0) memory[simdgroup_index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float total = simd_sum(lane < simdgroups ? memory[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return total;
}

}  // namespace ferrum
