// norm: a threadgroup computes one row. A thread adds the delta to its values, then scales the same values, so that no other thread's are needed
// but through the sum of squares. Rows of a multiple of 4 go by float4.
#include "rows.h"
#include "shared/norm.h"

using namespace ferrum;
using namespace ferrum::shared;

inline float square_sum(float value) { return value * value; }
inline float square_sum(float4 value) { return dot(value, value); }

template <typename Values>
inline void norm_row(constant NormArgs& args, device Values* residual, device const Values* delta, device const Values* weight, device Values* out, int size,
                     threadgroup float* memory, ushort thread_index, ushort lane, ushort simdgroup_index, ushort simdgroups) {
  const int threads = 32 * simdgroups;
  float squares = 0.0f;
  for (int i = thread_index; i < size; i += threads) {
    Values value = residual[i];
    if (args.has_delta != 0) {
      value += delta[i];
      residual[i] = value;
    }
    squares += square_sum(value);
  }
  const float mean = sum_of_threadgroup(squares, memory, lane, simdgroup_index, simdgroups) / float(args.cols);
  const float scale = 1.0f / precise::sqrt(mean + args.eps);
  for (int i = thread_index; i < size; i += threads) out[i] = residual[i] * scale * weight[i];
}

kernel void norm(constant NormArgs& args [[buffer(0)]],
                 device float* residual [[buffer(1)]],
                 device const float* delta [[buffer(2)]],
                 device const float* weight [[buffer(3)]],
                 device const int32_t* count [[buffer(4)]],
                 device float* out [[buffer(5)]],
                 threadgroup float* memory [[threadgroup(0)]],
                 uint3 group [[threadgroup_position_in_grid]],
                 ushort thread_index [[thread_index_in_threadgroup]],
                 ushort lane [[thread_index_in_simdgroup]],
                 ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
                 ushort simdgroups [[simdgroups_per_threadgroup]]) {
  if (int(group.x) >= count[0]) return;
  const ulong row = ulong(group.x) * ulong(args.cols);
  if (args.cols % 4 == 0)
    norm_row<float4>(args, (device float4*)(residual + row), (device const float4*)(delta + row), (device const float4*)weight, (device float4*)(out + row),
                     args.cols / 4, memory, thread_index, lane, simdgroup_index, simdgroups);
  else
    norm_row<float>(args, residual + row, delta + row, weight, out + row, args.cols, memory, thread_index, lane, simdgroup_index, simdgroups);
}
