// Kernels that leave their memory.
#include <metal_stdlib>
using namespace metal;

struct Sizes { int count, shift; };

kernel void copies(constant Sizes& sizes [[buffer(0)]], device const float* x [[buffer(1)]], device float* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  if (int(position) < sizes.count) out[position] = x[int(position) + sizes.shift];
}
kernel void writes_one_too_many(constant Sizes& sizes [[buffer(0)]], device float* out [[buffer(1)]], uint position [[thread_position_in_grid]]) {
  if (int(position) <= sizes.count) out[position] = 1.0f;
}
kernel void threadgroup_memory(constant Sizes& sizes [[buffer(0)]], device float* out [[buffer(1)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  shared[int(thread_index) + sizes.shift] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[thread_index] = shared[thread_index];
}
kernel void deep_stack(constant Sizes& sizes [[buffer(0)]], device float* out [[buffer(1)]], uint thread_index [[thread_index_in_threadgroup]]) {
  volatile float room[100000];
  for (int i = 0; i < sizes.count; i++) room[i] = float(i);
  out[thread_index] = room[sizes.shift];
}
// What nobody wrote is read.
kernel void unwritten(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  if (thread_index % 2 == 0) shared[thread_index] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[thread_index] = shared[thread_index];
}
