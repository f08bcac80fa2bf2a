// Types and block layouts of weights, for host and kernels. As defined by ggml (ggml-common.h of the GGUF format's reference implementation);
// all little endian. `d` and `dmin` are float16 bits.
#pragma once
#include "integers.h"

namespace ferrum {

/// Type ids of the GGUF format.
namespace type_id {
enum { f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14, iq4_nl = 20, iq4_xs = 23, bf16 = 30 };
}

/// 32 weights: w = d * (q - 8), q in 0..15. 2-byte aligned only.
/// `q`: byte i holds weight i in its low nibble and weight 16 + i in its high nibble.
struct BlockQ4_0 {
  uint16_t d;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_0) == 18, "BlockQ4_0 is packed");

/// 32 weights: w = d * q + m, `q` as in BlockQ4_0. 4-byte aligned.
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_1) == 20, "BlockQ4_1 is packed");

/// 32 weights: w = d * (q - 16), q in 0..31; the low four bits as in BlockQ4_0, bit i % 8 of high[i / 8] is the fifth of weight i. 2-byte aligned only.
struct BlockQ5_0 {
  uint16_t d;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_0) == 22, "BlockQ5_0 is packed");

/// 32 weights: w = d * q + m, `q` and `high` as in BlockQ5_0. 8-byte aligned.
struct BlockQ5_1 {
  uint16_t d, m;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_1) == 24, "BlockQ5_1 is packed");

/// 32 weights: w = d * q. 2-byte aligned only.
struct BlockQ8_0 {
  uint16_t d;
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34, "BlockQ8_0 is packed");

/// 256 weights in 16 sub-blocks of 16: w = d * scale[s] * q - dmin * min[s], q in 0..3. Rows keep blocks 4-byte aligned.
/// `scales`: scale[s] in the low four bits, min[s] in the high four. `q`: bits 2 g of byte 32 h + l hold weight 128 h + 32 g + l.
struct BlockQ2_K {
  uint8_t scales[16];
  uint8_t q[64];
  uint16_t d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84, "BlockQ2_K is packed");

/// 256 weights in 16 sub-blocks of 16: w = d * (scale[s] - 32) * (q - 4), q in 0..7. 2-byte aligned only.
/// `q`: the low two bits as in BlockQ2_K. `high`: bit n of byte l is the third bit of weight 32 n + l.
/// `scales`: the low four bits of scale[s] are a nibble of scales[s % 8], the low one for s < 8; the upper two are bits 2 (s / 4) of scales[8 + s % 4].
struct BlockQ3_K {
  uint8_t high[32];
  uint8_t q[64];
  uint8_t scales[12];
  uint16_t d;
};
static_assert(sizeof(BlockQ3_K) == 110, "BlockQ3_K is packed");

/// 256 weights in 8 sub-blocks of 32: w = d * scale[s] * q - dmin * min[s]. Rows of a file's tensor keep blocks 16-byte aligned.
/// `q`: byte 32 j + i holds weight i of sub-block 2 j in its low nibble and of sub-block 2 j + 1 in its high nibble.
/// `scales`: 8 six-bit scales and 8 six-bit mins. For s < 4: scale[s] = scales[s] & 63, min[s] = scales[s + 4] & 63;
/// for s >= 4: scale[s] = (scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4, min[s] = (scales[s + 4] >> 4) | (scales[s] >> 6) << 4.
struct BlockQ4_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144, "BlockQ4_K is packed");

/// 256 weights in 8 sub-blocks of 32: w = d * scale[s] * q - dmin * min[s], q in 0..31; `scales` as in BlockQ4_K. Rows keep blocks 16-byte aligned.
/// `q`: the low four bits as in BlockQ4_K. `high`: bit s of byte i is the fifth bit of weight i of sub-block s.
struct BlockQ5_K {
  uint16_t d, dmin;
  uint8_t scales[12];
  uint8_t high[32];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ5_K) == 176, "BlockQ5_K is packed");

/// 256 weights in 16 sub-blocks of 16: w = d * scales[s] * (q - 32), q in 0..63.
/// Half h (128 weights), group g of 32 in it, lane l: low four bits are in ql[64 h + 32 (g & 1) + l] (low nibble for g < 2, high
/// nibble for g >= 2), the two high bits are bits 2 g of qh[32 h + l]. 2-byte aligned only.
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210, "BlockQ6_K is packed");

/// 32 weights: w = d * value[q], `q` as in BlockQ4_0; value[0..15] = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113. 2-byte aligned only.
struct BlockIQ4_NL {
  uint16_t d;
  uint8_t q[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18, "BlockIQ4_NL is packed");

/// 256 weights in 8 sub-blocks of 32: w = d * (scale[s] - 32) * value[q]; values, and `q` of a sub-block, as in BlockIQ4_NL. Rows keep blocks 8-byte aligned.
/// scale[s]: the low four bits are a nibble of scales_low[s / 2], the low one for even s; the upper two are bits 2 s of scales_high.
struct BlockIQ4_XS {
  uint16_t d, scales_high;
  uint8_t scales_low[4];
  uint8_t q[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136, "BlockIQ4_XS is packed");

}  // namespace ferrum
