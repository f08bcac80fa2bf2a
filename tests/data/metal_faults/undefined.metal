// Undefined behaviour that an x86 machine forgives.
#include <metal_stdlib>
using namespace metal;

kernel void loads_a_word(device const uchar* x [[buffer(0)]], constant int& offset [[buffer(1)]], device uint* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  device const uint* words = reinterpret_cast<device const uint*>(x + offset);
  out[position] = words[position];
}
kernel void loads_a_vector(device const float* x [[buffer(0)]], constant int& offset [[buffer(1)]], device float* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  const float4 v = *reinterpret_cast<device const float4*>(x + offset);
  out[position] = v.x + v.y;
}
kernel void shifts(device const int* x [[buffer(0)]], constant int& amount [[buffer(1)]], device int* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  out[position] = x[position] << amount;
}
kernel void divides(device const int* x [[buffer(0)]], constant int& by [[buffer(1)]], device int* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  out[position] = x[position] / by;
}
kernel void indexes(device const int* x [[buffer(0)]], constant int& index [[buffer(1)]], device int* out [[buffer(2)]], uint position [[thread_position_in_grid]]) {
  int table[4];
  for (int i = 0; i < 4; i++) table[i] = x[i];
  out[position] = table[index];
}
