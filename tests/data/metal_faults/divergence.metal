// Meetings of lanes in divergent flow. Threadgroups of 64 threads.
#include <metal_stdlib>
using namespace metal;

static float summed(float x) { return simd_sum(x); }

kernel void barrier_in_a_branch(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  if (thread_index < 40) threadgroup_barrier(mem_flags::mem_threadgroup);
  out[thread_index] = 1.0f;
}
kernel void return_before_a_barrier(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  if (thread_index >= 50) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[thread_index] = 1.0f;
}
kernel void return_before_a_sum(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  if (thread_index % 32 >= 20) return;
  out[thread_index] = simd_sum(1.0f);
}
kernel void barriers_of_two_branches(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  if (thread_index < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[thread_index] = 1.0f;
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[thread_index] = 2.0f;
  }
}
kernel void operations_of_two_branches(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  float s = 0.0f;
  if (thread_index % 32 < 5) s = simd_sum(1.0f);
  else s = simd_max(float(thread_index));
  out[thread_index] = s;
}
// One line, reached from two branches.
kernel void one_function_of_two_branches(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  float s = 0.0f;
  if (thread_index % 32 < 5) {
    s = summed(1.0f);
    out[thread_index] = s * 3.0f;
  } else {
    s = summed(2.0f);
    out[thread_index] = s - 5.0f;
  }
}
kernel void loop_of_unequal_lengths(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  float s = 0.0f;
  for (uint i = 0; i <= thread_index % 2; i++) s += simd_sum(1.0f);
  out[thread_index] = s;
}
kernel void matrix_in_a_branch(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 m = simdgroup_float8x8(1.0f);
  if (thread_index % 32 < 16) simdgroup_load(m, out, 8);
  simdgroup_store(m, out, 8);
}
kernel void uniform_flow(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  float s = 0.0f;
  if (simdgroup == 0) s = summed(1.0f);
  else s = summed(2.0f);
  for (uint i = 0; i < 3; i++) s += simd_max(float(thread_index % 32));
  threadgroup_barrier(mem_flags::mem_none);
  out[thread_index] = s;
}
