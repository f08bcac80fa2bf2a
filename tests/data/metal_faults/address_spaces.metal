// Every line marked `wrong` breaks a rule of the language that a plain C++ compiler does not know; no other line may be reported.
#include <metal_stdlib>
using namespace metal;

struct Pair {
  int n;
  float v[4];
  float first() const { return v[0]; }
};
template <typename T> void zero(device T* p) { p[0] = T(0); }
float sum_of(thread const float* p) { return p[0]; }

kernel void fine(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant Pair& pair [[buffer(2)]], threadgroup float* shared [[threadgroup(0)]], uint t [[thread_position_in_threadgroup]]) {
  float local_values[4] = {0.0f, 1.0f, 2.0f, 3.0f};
  thread float* p = local_values;
  float4 v = reinterpret_cast<device float4*>(y)[t];
  v.xy = v.zw;
  v = v * 2.0f + float4(1.0f) * float(pair.n);
  const half4 h = half4(v);
  zero(y);
  shared[t] = sum_of(p) + float(h.x) + pair.v[1] * x[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = shared[t] * min(v.x, 1.0f);
}
kernel void wrong(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], constant Pair& pair [[buffer(2)]], threadgroup float* shared [[threadgroup(0)]], uint t [[thread_position_in_threadgroup]]) {
  float local_values[4];
  threadgroup float* a = y;                // wrong: device as threadgroup
  device float* b = shared;                // wrong: threadgroup as device
  device float* c = local_values;          // wrong: thread as device
  x[0] = 1.0f;                             // wrong: const
  pair.n = 3;                              // wrong: constant
  float* q = local_values;                 // wrong: no address space
  thread float* r = y;                     // wrong: device as thread
  thread Pair& s = pair;                   // wrong: constant as thread
  Pair copy = pair;                        // wrong: a struct copied out of constant memory
  half4 h = float4(1.0f);                  // wrong: vectors do not convert by themselves
  double d = 1.0;                          // wrong: no double
  zero(shared);                            // wrong: no such overload
  float f = sum_of(x);                     // wrong: device as thread
  float m = min(1.0f, t);                  // wrong: types differ
  float g = pair.first();                  // wrong: a method of an object in constant memory
  auto square = [](float z) { return z * z; };  // wrong: a lambda
  if constexpr (sizeof(float) == 4) y[0] = 1.0f;  // wrong: C++17
  float4 half_filled = {1.0f};             // wrong: neither splat nor all components
  threadgroup float inside[32];            // wrong: threadgroup memory in a body
}
void unqualified(float* p);                // wrong: a pointer parameter without an address space
struct Holder {
  const float& reference;                  // wrong: a reference without an address space
};
