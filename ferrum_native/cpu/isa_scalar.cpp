
#define FERRUM_ISA scalar
#include "simd.h"
#include "kernels.h"
#include "tuning.h"
namespace ferrum::cpu::scalar {
#include "dot_common.inl"
#include "dot_q4_k.inl"
#include "dot_q6_k.inl"
#include "dot_q8_0.inl"
#include "dot_float.inl"
#include "rows.inl"
#include "attention.inl"
#include "candidates.inl"
}
namespace ferrum::cpu {
using namespace scalar;
const Kernels kernels_scalar = {"scalar", {dotf<deq_f32>,dotf<deq_f16>,dot_q8_0,dot_q4_k,dot_q6_k,dotf<deq_bf16>}, {dotf<deq_f32>,dotf<deq_f16>,dotf<dequantize_q8_0>,dotf<dequantize_q4_k>,dotf<dequantize_q6_k>,dotf<deq_bf16>}, dot_scratch_bytes,
 {deq_f32,deq_f16,dequantize_q8_0,dequantize_q4_k,dequantize_q6_k,deq_bf16}, q32, q256, scalar::norm, qk_norm_rope, write_key, write_value, attention_tile, attention_combine, attention_result, softmax, silu_product, weighted_sum, next_greater, sum_exp};
}
