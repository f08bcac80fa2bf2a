// Kernels with one planted race each, beside the same kernel without it. Threadgroups of 64 threads.
#include <metal_stdlib>
using namespace metal;

kernel void neighbour_with_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[group * 64 + thread_index] = shared[63 - thread_index];
}
kernel void neighbour_without_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  out[group * 64 + thread_index] = shared[63 - thread_index];
}
// A barrier of the wrong memory orders nothing here.
kernel void neighbour_with_barrier_of_device_memory(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  threadgroup_barrier(mem_flags::mem_device);
  out[group * 64 + thread_index] = shared[63 - thread_index];
}
// The barrier before the second round's writes is missing.
kernel void rounds_without_second_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  float sum = 0.0f;
  for (int round = 0; round < 2; round++) {
    shared[thread_index] = float(thread_index + round);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += shared[63 - thread_index];
  }
  out[group * 64 + thread_index] = sum;
}

kernel void lanes_with_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[group * 64 + thread_index] = shared[thread_index ^ 1];
}
kernel void lanes_without_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  out[group * 64 + thread_index] = shared[thread_index ^ 1];
}
kernel void lanes_with_a_sum_for_a_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  const float sum = simd_sum(1.0f);
  out[group * 64 + thread_index] = shared[thread_index ^ 1] + sum;
}
// A simdgroup's barrier does not order the other simdgroup.
kernel void simdgroups_with_a_lanes_barrier(device float* out [[buffer(0)]], threadgroup float* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = float(thread_index);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[group * 64 + thread_index] = shared[thread_index ^ 32];
}

// Two halves of one word by two threads are no race.
kernel void halves_of_a_word(device float* out [[buffer(0)]], threadgroup half* shared [[threadgroup(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  shared[thread_index] = half(thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[group * 64 + thread_index] = float(shared[63 - thread_index]);
}

kernel void device_memory_with_barrier(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  device float* own = out + group * 64;
  own[thread_index] = float(thread_index);
  threadgroup_barrier(mem_flags::mem_device);
  const float other = own[63 - thread_index];
  threadgroup_barrier(mem_flags::mem_device);
  own[thread_index] = other;
}
kernel void device_memory_with_barrier_of_threadgroup_memory(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  device float* own = out + group * 64;
  own[thread_index] = float(thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float other = own[63 - thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  own[thread_index] = other;
}
kernel void threadgroups_write_one_place(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]]) { out[thread_index] = float(thread_index); }
kernel void threadgroups_read_each_other(device float* out [[buffer(0)]], uint thread_index [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]]) {
  out[group * 64 + thread_index] = 1.0f;
  threadgroup_barrier(mem_flags::mem_device);
  out[group * 64 + thread_index] = out[(group + 1) % groups * 64 + thread_index];
}

kernel void counter_by_atomics(device atomic_uint* out [[buffer(0)]]) { atomic_fetch_add_explicit(out, 1u, memory_order_relaxed); }
kernel void counter_without_atomics(device uint* out [[buffer(0)]]) { out[0] += 1u; }
kernel void counter_read_beside_atomics(device atomic_uint* out [[buffer(0)]], device const uint* same [[buffer(1)]], device uint* seen [[buffer(2)]], uint thread_index [[thread_index_in_threadgroup]]) {
  atomic_fetch_add_explicit(out, 1u, memory_order_relaxed);
  seen[thread_index] = reinterpret_cast<device uint*>(out)[0] + same[0];
}
