// The kernels of one instruction set: what the CPU backend's ops call inside their parallel loops.
// Each isa_*.cpp compiles the same kernel sources under its own compiler flags and exports one table.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/kv_type.h"
#include "../core/quant_types.h"

namespace ferrum::cpu {

/// Factors of 32 activations: the largest for which the sum of 32 products with a factor still fits an int16.
constexpr int max_factor = 8;

/// Where quantize_q8_256 writes; as the fields of Column.
struct PackedRow {
  int8_t* q;
  float* scale;
  int16_t *factor_32, *sums_16;
};

/// One activation vector of k values in the forms its consumers asked for; pointers of other forms are null.
struct Column {
  const float* values;    // [k]
  const int8_t* q8_32;    // [k], value = scale_32[i / 32] * q8_32[i]
  const float* scale_32;  // [k / 32]
  const int8_t* q8_256;      // [k], value = scale_256[i / 256] * factor_32[i / 32] * q8_256[i]; k is a multiple of 256
  const float* scale_256;    // [k / 256]
  const int16_t* factor_32;  // [k / 32], 1..max_factor
  const int16_t* sums_16;    // [k / 16], sum of factor_32 * q8_256 over 16 values
};

/// out[c][r] = weights[r] . columns[c], for `rows` consecutive weight rows.
///
/// The bits of out[c][r] depend on that row and that column alone, never on `rows`, on `column_count`, on the tile that computes them or
/// on the instruction set. Per pair (row, column), all float32, `i*` exact in int32, blocks in ascending order, acc starts at 0:
///   Q4_0, Q5_0, Q8_0, IQ4_NL:  acc = fma(d_w * d_y, float(isum), acc)                         per 32-block,
///          isum = (q - 8) . y, (q - 16) . y, q . y, value[q] . y
///   Q4_1, Q5_1:  acc = fma(d_y, fma(d, float(isum), m * float(sum of y)), acc)                per 32-block, isum = q . y
///   Q2_K, Q4_K, Q5_K:  acc = fma(d_y, fma(d, float(isum), -(dmin * float(msum))), acc)        per 256-block,
///          isum = sum over s of scale[s] * f_s * (q . y)_s, msum = sum over s of min[s] * f_s * ysum_s
///   Q3_K, Q6_K, IQ4_XS:  acc = fma(d_y * d, float(isum), acc)                                 per 256-block,
///          Q3_K: isum = sum over s of (scale[s] - 32) * f_s * ((q - 4) . y)_s
///          Q6_K: isum = sum over s of scale[s] * f_s * ((q - 32) . y)_s
///          IQ4_XS: isum = sum over s of (scale[s] - 32) * f_s * (value[q] . y)_s
///   where f_s is the factor_32 of sub-block s: the sum stays exact in int32, and a sub-block of small values keeps its precision.
///   float: 32 partial sums, partial j takes the k = j (mod 32) in ascending order by fma(w, y, partial) (a tail is padded with zeros);
///          as four vectors v0..v3 of 8 lanes: reduce_add((v0 + v1) + (v2 + v3)).
/// Float products of quantized weights first make w exactly as: Q8_0 d * q; Q4_0 d * (q - 8); Q5_0 d * (q - 16); Q4_1, Q5_1 fma(d, q, m);
/// Q2_K, Q4_K, Q5_K fma(d * scale, q, -(dmin * min)); Q3_K (d * (scale - 32)) * (q - 4); Q6_K (d * scale) * (q - 32);
/// IQ4_NL d * value[q]; IQ4_XS (d * (scale - 32)) * value[q].
struct DotArgs {
  const std::byte* weights;  // first row; 2-byte aligned, F32 4-byte aligned
  size_t row_bytes;          // from one row to the next
  int rows;                  // any number >= 1
  int k;                     // a multiple of the type's block
  const Column* columns;     // [column_count]
  int column_count;
  float* const* out;         // [column_count] pointers to [rows]
  std::byte* scratch;        // dot_scratch_bytes(k), 64-byte aligned; this thread's own
};
using DotKernel = void (*)(const DotArgs&);

constexpr int max_head_dim = 512;

struct NormRowArgs {
  float* residual;     // [size], residual += delta
  const float* delta;  // [size] or null
  const float* weight; // [size]
  int size;
  float eps;
  float* out;          // [size] = residual / sqrt(mean of squares + eps) * weight
};

struct QkNormRopeArgs {
  const float* in;       // [head_dim]
  const float* weight;   // [head_dim], or null: no norm
  const float* cos_sin;  // [rotary_dim]: cos of each pair, then sin of each
  int head_dim, rotary_dim;
  float eps;
  float* out;            // [head_dim]: normed, then value i < rotary_dim / 2 rotated with value i + rotary_dim / 2
};

/// Group g of the 16 keys, or the 16 values, of a kv head's block in q8_0: dimensions 32 g to 32 g + 31. The block is [head_dim / 32] of it.
/// A number is scale * q; int8 that meet in one sum of products lie side by side.
struct KvGroupQ8_0 {
  uint16_t scale[16];       // float16, of each token
  int8_t q[16 * kv_group];  // keys [16 pairs of dimensions][16 tokens][2], values [8 pairs of tokens][32 dimensions][2]

  static constexpr int key_at(int place, int d) { return d / 2 * 32 + 2 * place + d % 2; }
  static constexpr int value_at(int place, int d) { return place / 2 * 64 + 2 * d + place % 2; }
};
static_assert(sizeof(KvGroupQ8_0) == 16 * (kv_group + 2));

/// The part of one key range in the softmax of some queries of one kv head: online softmax over groups of keys in rising order.
///
/// Of each query head alone, in float32, with groups in rising order; M is the largest score so far, keep what earlier sums are multiplied with:
///   f16, f32:  64 keys at a time: score = scale * (q . k), one fma chain over the dimensions; p = exp(score - M), keep = exp(earlier M - M);
///              value_d = value_d * keep, then fma(p, v_d, value_d) for each visible key in rising order;
///              sum = fma(sum, keep, sum of p), of which lane i first adds the keys i, 16 + i, 32 + i, 48 + i.
///   q8_0:      16 keys at a time: q is rounded to q_16 * q_scale per group g, where q_scale = max |q| / 32767; sums of products of integers are exact in int32:
///              score = scale * s, s = fma(scale_k * q_scale, float(q_16 . k), s) for each g, rising;
///              p = exp(score - m), m the block's largest score; take = exp(m - M), keep = exp(earlier M - M);
///              with S = max scale_v of the visible keys of g and w = round(p * (scale_v * (32767 / S))), 0 of keys that are not visible,
///              value_d = fma(float(w . v_d), S / 32767 * take, value_d * keep).
///              So each p is known to 2^-16 of the block's largest, and q to 2^-16 of its group's: far below the rounding of k and v.
struct AttentionTileArgs {
  const float* q;             // [queries], q_stride apart, each [group, head_dim]
  size_t q_stride;            // floats
  int queries, group;         // query heads of the kv head
  int head_dim;               // a multiple of 8
  int first_position;         // of the first query; they rise by one
  float scale;
  KvType kv_type;
  const std::byte* keys;      // of this kv head in block 0: [head_dim, 16] or KvGroupQ8_0 [head_dim / 32]
  const std::byte* values;    // [16, head_dim] or KvGroupQ8_0 [head_dim / 32]
  size_t block_bytes;         // from block to block
  const int32_t* blocks;      // block of each 16 positions
  int key_begin, key_end;     // absolute positions; key_begin is a multiple of 64
  int16_t* q_16;              // of q8_0: this thread's own [queries * group, head_dim]
  float* q_scale;             // and [queries * group, head_dim / 32]
  float* partial;             // out [queries * group, head_dim + 2]: weighted values, largest score, sum of weights
};

struct Kernels {
  const char* name;  // "avx512", "avx2", "neon-i8mm", "neon-dotprod", "neon", "scalar"

  DotKernel dot[weight_type_count];        // activations in the form of the type
  DotKernel dot_float[weight_type_count];  // float activations
  size_t (*dot_scratch_bytes)(int k);

  /// One row of a weight matrix as float: w made exactly as in dot_float.
  void (*dequantize[weight_type_count])(const std::byte* row, int k, float* out);

  /// d = max |x| / 127, q = round to nearest even of x * (127 / max |x|); a block of zeros has d = 0 and q = 0. k is a multiple of the block.
  void (*quantize_q8_32)(const float* x, int k, int8_t* q, float* scale);
  /// With A = max |x| of 256 values and a = max |x| of 32 of them: d = A / (127 max_factor), factor = ceil(a * (max_factor / A)) but at
  /// least 1, q = round to nearest even of x * ((127 max_factor / A) / factor). Half the error of one scale for all 256.
  void (*quantize_q8_256)(const float* x, int k, const PackedRow& out);

  void (*norm)(const NormRowArgs&);
  void (*qk_norm_rope)(const QkNormRopeArgs&);
  /// Into place 0..15 of a kv head's block, laid out as AttentionTileArgs says. q8_0, of 32 values: scale = the least float16 that is not below
  /// max |x| / 127, q = round to nearest even of x * (1 / scale); so a value is off by at most scale / 2. Zeros have scale 0.
  void (*write_key)(const float* key, int head_dim, KvType, int place, std::byte* block);
  void (*write_value)(const float* value, int head_dim, KvType, int place, std::byte* block);
  void (*attention_tile)(const AttentionTileArgs&);
  /// total = total and partial together; a partial result without keys changes nothing.
  void (*attention_combine)(float* total, const float* partial, int head_dim);
  void (*attention_result)(const float* total, int head_dim, float* out);

  void (*softmax)(float* x, int n);
  void (*silu_product)(float* gate, const float* up, int n);  // gate = gate / (1 + exp(-gate)) * up
  void (*add_weighted)(const float* x, float weight, int n, float* out);  // out = fma(weight, x, out)

  /// First index in begin .. end - 1 whose value is above the threshold; `end` if there is none.
  int (*next_greater)(const float* x, int begin, int end, float threshold);
  /// Sum of exp((x - shift) * scale) in double.
  double (*sum_exp)(const float* x, int n, double shift, double scale);
};

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;    // AVX2, FMA and F16C
extern const Kernels kernels_avx512;  // those and AVX-512 F, BW, DQ, VL, VNNI
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Kernels kernels_neon_dotprod;  // dot products of int8 (FEAT_DotProd)
extern const Kernels kernels_neon_i8mm;     // those and products of int8 matrices (FEAT_I8MM)
#endif

}  // namespace ferrum::cpu
