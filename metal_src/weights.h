// How a lane reads weights of each type.
//
// A format cuts a row into units. One lane loads a unit with the widest loads that the type's alignment allows, neighbouring units lie in
// neighbouring lanes, and every byte belongs to one unit (but scales, which neighbours share). A unit is `quads` runs of 4 weights;
// run `quad` of `unit` starts at column `at(unit, quad)`.
#pragma once
#include <metal_stdlib>
#include "shared/quant_blocks.h"
#include "shared/weight_types.h"

using namespace metal;

constant int weight_type_0 [[function_constant(0)]];
constant int weight_type_1 [[function_constant(1)]];
constant int weight_type_2 [[function_constant(2)]];

namespace ferrum {

inline float4 bytes_as_floats(uint bytes) { return float4(as_type<uchar4>(bytes)); }
inline uint two_shorts(device const ushort* at) { return uint(at[0]) | uint(at[1]) << 16; }

/// 16 weights of a block's 32: two times 8, whose low four bits are in 8 bytes.
struct HalfBlock {
  enum { quads = 4, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 16; }
  static uint at(uint unit, uint quad) { return 32 * (unit / 2) + 16 * (quad / 2) + 8 * (unit % 2) + 4 * (quad % 2); }

  /// The stored numbers of `unit`; `high` are the fifth bits of the block's weights.
  static float4 numbers(device const uint8_t* stored, uint unit, uint quad, uint high) {
    const uint low = two_shorts((device const ushort*)stored + 4 * (unit % 2) + 2 * (quad % 2)) >> (4 * (quad / 2));
    const uint bits = high >> (at(unit, quad) % 32);
    const uint fifth = (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21;  // one bit in each byte
    return bytes_as_floats((low & 0x0f0f0f0fu) | fifth << 4);
  }
};
struct Q4_0 : HalfBlock {
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ4_0* block = (device const BlockQ4_0*)row + unit / 2;
    const float d = float(as_type<half>(block->d));
    for (uint quad = 0; quad < 4; ++quad) w[quad] = d * (numbers(block->q, unit, quad, 0) - 8.f);
  }
};
struct Q4_1 : HalfBlock {
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ4_1* block = (device const BlockQ4_1*)row + unit / 2;
    const float d = float(as_type<half>(block->d)), m = float(as_type<half>(block->m));
    for (uint quad = 0; quad < 4; ++quad) w[quad] = d * numbers(block->q, unit, quad, 0) + m;
  }
};
struct Q5_0 : HalfBlock {
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ5_0* block = (device const BlockQ5_0*)row + unit / 2;
    const float d = float(as_type<half>(block->d));
    const uint high = two_shorts((device const ushort*)block->high);
    for (uint quad = 0; quad < 4; ++quad) w[quad] = d * (numbers(block->q, unit, quad, high) - 16.f);
  }
};
struct Q5_1 : HalfBlock {
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ5_1* block = (device const BlockQ5_1*)row + unit / 2;
    const float d = float(as_type<half>(block->d)), m = float(as_type<half>(block->m));
    const uint high = two_shorts((device const ushort*)block->high);
    for (uint quad = 0; quad < 4; ++quad) w[quad] = d * numbers(block->q, unit, quad, high) + m;
  }
};

/// 8 weights of a block's 32: four 2-byte loads.
struct Q8_0 {
  enum { quads = 2, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 8; }
  static uint at(uint unit, uint quad) { return 8 * unit + 4 * quad; }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ8_0* block = (device const BlockQ8_0*)row + unit / 4;
    device const ushort* q = (device const ushort*)block->q + 4 * (unit % 4);
    const float d = float(as_type<half>(block->d));
    for (uint quad = 0; quad < 2; ++quad) w[quad] = d * float4(as_type<char4>(two_shorts(q + 2 * quad)));
  }
};

/// 32 weights of a block's 256: 4 neighbours in each of the 4 groups of both halves, in 2 x 4 bytes; 8 lanes share the scales.
struct Q2_K {
  enum { quads = 8, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 32; }
  static uint at(uint unit, uint quad) { return 256 * (unit / 8) + 32 * quad + 4 * (unit % 8); }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ2_K* block = (device const BlockQ2_K*)row + unit / 8;
    const uint lane = unit % 8;
    device const uint* q = (device const uint*)block->q + lane;
    device const uint8_t* scales = block->scales + lane / 4;
    const float d = float(as_type<half>(block->d)), dmin = float(as_type<half>(block->dmin));
    for (uint quad = 0; quad < 8; ++quad) {
      const uint both = scales[2 * quad];
      w[quad] = d * float(both & 15u) * bytes_as_floats((q[8 * (quad / 4)] >> (2 * (quad % 4))) & 0x03030303u) - dmin * float(both >> 4);
    }
  }
};

/// 32 weights of a block's 256: as Q2_K, with third bits in the same 4 bytes for all 8.
struct Q3_K {
  enum { quads = 8, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 32; }
  static uint at(uint unit, uint quad) { return 256 * (unit / 8) + 32 * quad + 4 * (unit % 8); }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ3_K* block = (device const BlockQ3_K*)row + unit / 8;
    const uint lane = unit % 8;
    device const ushort* q = (device const ushort*)block->q + 2 * lane;
    const uint low[2] = {two_shorts(q), two_shorts(q + 16)};
    const uint high = two_shorts((device const ushort*)block->high + 2 * lane);
    const float d = float(as_type<half>(block->d));
    for (uint quad = 0; quad < 8; ++quad) {
      const uint s = 2 * quad + lane / 4;
      const uint scale = ((uint(block->scales[s % 8]) >> (4 * (s / 8))) & 15u) | ((uint(block->scales[8 + s % 4]) >> (2 * (s / 4))) & 3u) << 4;
      const uint values = ((low[quad / 4] >> (2 * (quad % 4))) & 0x03030303u) | ((high >> quad) & 0x01010101u) << 2;
      w[quad] = d * (float(scale) - 32.f) * (bytes_as_floats(values) - 4.f);
    }
  }
};

/// 32 weights of a block's 256: 16 bytes, whose low nibbles are in one sub-block and whose high nibbles are in the next; 8 lanes share the header.
struct Q4_K {
  enum { quads = 8, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 32; }
  static uint at(uint unit, uint quad) { return 64 * (unit / 2) + 16 * (unit % 2) + 32 * (quad / 4) + 4 * (quad % 4); }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ4_K* block = (device const BlockQ4_K*)row + unit / 8;
    const uint4 header = *(device const uint4*)block;  // d and dmin, then scales
    const uint4 q = ((device const uint4*)block->q)[unit % 8];
    const half2 d = as_type<half2>(header.x);
    const bool last_four = unit % 8 >= 4;
    const uint shift = 16 * (unit / 2 % 2);
    const uint scales = (last_four ? (header.w & 0x0f0f0f0fu) | ((header.y >> 2) & 0x30303030u) : header.y & 0x3f3f3f3fu) >> shift;
    const uint mins = (last_four ? ((header.w >> 4) & 0x0f0f0f0fu) | ((header.z >> 2) & 0x30303030u) : header.z & 0x3f3f3f3fu) >> shift;
    const float low_scale = float(d.x) * float(scales & 0xffu), high_scale = float(d.x) * float((scales >> 8) & 0xffu);
    const float low_min = float(d.y) * float(mins & 0xffu), high_min = float(d.y) * float((mins >> 8) & 0xffu);
    for (uint quad = 0; quad < 4; ++quad) {
      w[quad] = low_scale * bytes_as_floats(q[quad] & 0x0f0f0f0fu) - low_min;
      w[4 + quad] = high_scale * bytes_as_floats((q[quad] >> 4) & 0x0f0f0f0fu) - high_min;
    }
  }
};

/// 32 weights of a block's 256: 4 neighbours in each of the 8 sub-blocks, whose fifth bits are in the same 4 bytes; 8 lanes share the header.
struct Q5_K {
  enum { quads = 8, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 32; }
  static uint at(uint unit, uint quad) { return 256 * (unit / 8) + 32 * quad + 4 * (unit % 8); }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ5_K* block = (device const BlockQ5_K*)row + unit / 8;
    const uint4 header = *(device const uint4*)block;  // d and dmin, then scales
    const half2 d = as_type<half2>(header.x);
    const uint scales[2] = {header.y & 0x3f3f3f3fu, (header.w & 0x0f0f0f0fu) | ((header.y >> 2) & 0x30303030u)};
    const uint mins[2] = {header.z & 0x3f3f3f3fu, ((header.w >> 4) & 0x0f0f0f0fu) | ((header.z >> 2) & 0x30303030u)};
    const uint high = ((device const uint*)block->high)[unit % 8];
    device const uint* q = (device const uint*)block->q + unit % 8;
    for (uint quad = 0; quad < 8; ++quad) {
      const uint shift = 8 * (quad % 4), low = q[8 * (quad / 2)] >> (4 * (quad % 2));
      const float scale = float(d.x) * float((scales[quad / 4] >> shift) & 0xffu), minimum = float(d.y) * float((mins[quad / 4] >> shift) & 0xffu);
      w[quad] = scale * bytes_as_floats((low & 0x0f0f0f0fu) | ((high >> quad) & 0x01010101u) << 4) - minimum;
    }
  }
};

/// 16 weights of a block's 256: 4 neighbours in each of the 4 groups of a half, whose low bits are in 2 x 4 bytes and whose high bits in 4.
struct Q6_K {
  enum { quads = 4, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 16; }
  static uint at(uint unit, uint quad) { return 128 * (unit / 8) + 32 * quad + 4 * (unit % 8); }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockQ6_K* block = (device const BlockQ6_K*)row + unit / 16;
    const uint half_index = unit / 8 % 2, lane = unit % 8;
    device const ushort* ql = (device const ushort*)(block->ql + 64 * half_index + 4 * lane);
    const uint low = two_shorts(ql), next = two_shorts(ql + 16);
    const uint high = two_shorts((device const ushort*)(block->qh + 32 * half_index + 4 * lane));
    device const int8_t* scales = block->scales + 8 * half_index + lane / 4;
    const float d = float(as_type<half>(block->d));
    w[0] = d * float(scales[0]) * (bytes_as_floats((low & 0x0f0f0f0fu) | (high & 0x03030303u) << 4) - 32.f);
    w[1] = d * float(scales[2]) * (bytes_as_floats((next & 0x0f0f0f0fu) | (high & 0x0c0c0c0cu) << 2) - 32.f);
    w[2] = d * float(scales[4]) * (bytes_as_floats(((low >> 4) & 0x0f0f0f0fu) | (high & 0x30303030u)) - 32.f);
    w[3] = d * float(scales[6]) * (bytes_as_floats(((next >> 4) & 0x0f0f0f0fu) | (high & 0xc0c0c0c0u) >> 2) - 32.f);
  }
};

constant float iq4_values[16] = {-127.f, -104.f, -83.f, -65.f, -49.f, -35.f, -22.f, -10.f, 1.f, 13.f, 25.f, 38.f, 53.f, 69.f, 89.f, 113.f};
inline float4 iq4_values_of(uint bytes) { return float4(iq4_values[bytes & 15u], iq4_values[(bytes >> 8) & 15u], iq4_values[(bytes >> 16) & 15u], iq4_values[(bytes >> 24) & 15u]); }

struct IQ4_NL : HalfBlock {
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockIQ4_NL* block = (device const BlockIQ4_NL*)row + unit / 2;
    device const ushort* q = (device const ushort*)block->q + 4 * (unit % 2);
    const float d = float(as_type<half>(block->d));
    for (uint quad = 0; quad < 4; ++quad) w[quad] = d * iq4_values_of(two_shorts(q + 2 * (quad % 2)) >> (4 * (quad / 2)));
  }
};

/// 32 weights of a block's 256: a sub-block of 16 bytes; 8 lanes share the scales.
struct IQ4_XS {
  enum { quads = 8, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 32; }
  static uint at(uint unit, uint quad) { return 32 * unit + 4 * quad; }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    device const BlockIQ4_XS* block = (device const BlockIQ4_XS*)row + unit / 8;
    const uint s = unit % 8;
    device const uint2* q = (device const uint2*)block->q + 2 * s;
    const uint scale = ((uint(block->scales_low[s / 2]) >> (4 * (s % 2))) & 15u) | ((uint(block->scales_high) >> (2 * s)) & 3u) << 4;
    const float d = float(as_type<half>(block->d)) * (float(scale) - 32.f);
    for (uint quad = 0; quad < 8; ++quad) w[quad] = d * iq4_values_of(q[quad % 4 / 2][quad % 2] >> (4 * (quad / 4)));
  }
};

struct F32 {
  typedef float One;
  typedef float4 Four;
  static float value(float stored) { return stored; }
  static float4 values(float4 stored) { return stored; }
};
struct F16 {
  typedef half One;
  typedef half4 Four;
  static float value(half stored) { return float(stored); }
  static float4 values(half4 stored) { return float4(stored); }
};
struct BF16 {
  typedef ushort One;
  typedef ushort4 Four;
  static float value(ushort stored) { return as_type<float>(uint(stored) << 16); }
  static float4 values(ushort4 stored) { return as_type<float4>(uint4(stored) << 16u); }
};

/// 4 float weights; columns are a multiple of 4.
template <typename Element> struct Floats {
  enum { quads = 1, aligned = 1 };
  static uint units(int cols) { return uint(cols) / 4; }
  static uint at(uint unit, uint) { return 4 * unit; }
  static void load(device const uint8_t* row, uint unit, int, thread float4* w) {
    w[0] = Element::values(((device const typename Element::Four*)row)[unit]);
  }
};

/// 4 float weights, one by one; any columns. Models have none such; tests do.
template <typename Element> struct LooseFloats {
  enum { quads = 1, aligned = 0 };
  static uint units(int cols) { return (uint(cols) + 3) / 4; }
  static uint at(uint unit, uint) { return 4 * unit; }
  static void load(device const uint8_t* row, uint unit, int cols, thread float4* w) {
    device const typename Element::One* stored = (device const typename Element::One*)row + 4 * unit;
    w[0] = float4(0.f);
    for (uint i = 0; i < 4; ++i)
      if (4 * unit + i < uint(cols)) w[0][i] = Element::value(stored[i]);
  }
};

/// 4 activations from column `at` on; beyond the row zeros.
template <typename Format> inline float4 load_quad(device const float* row, uint at, int cols) {
  if (Format::aligned) return *(device const float4*)(row + at);
  float4 values = float4(0.f);
  for (uint i = 0; i < 4; ++i)
    if (at + i < uint(cols)) values[i] = row[at + i];
  return values;
}
template <typename Format> inline void store_quad(device float* row, uint at, int cols, float4 values) {
  if (Format::aligned) {
    *(device float4*)(row + at) = values;
    return;
  }
  for (uint i = 0; i < 4; ++i)
    if (at + i < uint(cols)) row[at + i] = values[i];
}

/// Whether this pipeline has weights of a type; known when the pipeline is made, so that only their code is in it.
inline bool pipeline_has(int type) { return weight_type_0 == type || weight_type_1 == type || weight_type_2 == type; }

}  // namespace ferrum

/// Runs a statement in which `Format` is the format of weights of `type` with `cols` columns.
#define FERRUM_WITH_FORMAT(type, cols, ...)                                                                                       \
  if (pipeline_has(type_id::q4_k) && (type) == type_id::q4_k) { typedef Q4_K Format; __VA_ARGS__; }                               \
  else if (pipeline_has(type_id::q2_k) && (type) == type_id::q2_k) { typedef Q2_K Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q3_k) && (type) == type_id::q3_k) { typedef Q3_K Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q5_k) && (type) == type_id::q5_k) { typedef Q5_K Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q6_k) && (type) == type_id::q6_k) { typedef Q6_K Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q8_0) && (type) == type_id::q8_0) { typedef Q8_0 Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q4_0) && (type) == type_id::q4_0) { typedef Q4_0 Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q4_1) && (type) == type_id::q4_1) { typedef Q4_1 Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q5_0) && (type) == type_id::q5_0) { typedef Q5_0 Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::q5_1) && (type) == type_id::q5_1) { typedef Q5_1 Format; __VA_ARGS__; }                          \
  else if (pipeline_has(type_id::iq4_nl) && (type) == type_id::iq4_nl) { typedef IQ4_NL Format; __VA_ARGS__; }                    \
  else if (pipeline_has(type_id::iq4_xs) && (type) == type_id::iq4_xs) { typedef IQ4_XS Format; __VA_ARGS__; }                    \
  else if (pipeline_has(type_id::f32) && (type) == type_id::f32) { FERRUM_WITH_FLOATS(F32, cols, __VA_ARGS__) }                   \
  else if (pipeline_has(type_id::f16) && (type) == type_id::f16) { FERRUM_WITH_FLOATS(F16, cols, __VA_ARGS__) }                   \
  else if (pipeline_has(type_id::bf16) && (type) == type_id::bf16) { FERRUM_WITH_FLOATS(BF16, cols, __VA_ARGS__) }
#define FERRUM_WITH_FLOATS(Element, cols, ...)                                                                                    \
  if ((cols) % 4 == 0) { typedef Floats<Element> Format; __VA_ARGS__; } else { typedef LooseFloats<Element> Format; __VA_ARGS__; }
