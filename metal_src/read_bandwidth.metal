// A threadgroup sums bandwidth_vectors_of_group vectors of 16 bytes, thread t those at t + any multiple of its threads; a lane holds one sum.
#include <metal_stdlib>
#include "shared/read_bandwidth.h"
using namespace metal;
using namespace ferrum::shared;

kernel void read_bandwidth(constant ReadBandwidthArgs& args [[buffer(0)]], device const uint4* data [[buffer(1)]], device uint* sums [[buffer(2)]],
                           uint group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  device const uint4* share = data + group * uint(args.vectors_of_group);
  uint4 sum = uint4(0u);
  for (uint i = thread_index; i < uint(args.vectors_of_group); i += threads) sum += share[i];
  sums[group * threads + thread_index] = sum.x + sum.y + sum.z + sum.w;
}
