// Weight types of GGUF files: the one list of types that ferrum computes with. Their block layouts are shared with the kernels of GPUs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../../metal_src/shared/quant_blocks.h"

namespace ferrum {

/// How the activations of a product with a weight type are packed.
enum class ActivationForm : uint8_t {
  Float,   // float values as they are
  Q8_32,   // int8, one float scale for each 32 values
  Q8_256,  // int8, one float scale for each 256 values, and sums of 16
};

// name, ggml type id, weights in a block, bytes of a block, activation form of its int8 product
#define FERRUM_WEIGHT_TYPES(X)                                 \
  X(F32, type_id::f32, 1, 4, ActivationForm::Float)            \
  X(F16, type_id::f16, 1, 2, ActivationForm::Float)            \
  X(Q4_0, type_id::q4_0, 32, 18, ActivationForm::Q8_32)        \
  X(Q4_1, type_id::q4_1, 32, 20, ActivationForm::Q8_32)        \
  X(Q5_0, type_id::q5_0, 32, 22, ActivationForm::Q8_32)        \
  X(Q5_1, type_id::q5_1, 32, 24, ActivationForm::Q8_32)        \
  X(Q8_0, type_id::q8_0, 32, 34, ActivationForm::Q8_32)        \
  X(Q2_K, type_id::q2_k, 256, 84, ActivationForm::Q8_256)      \
  X(Q3_K, type_id::q3_k, 256, 110, ActivationForm::Q8_256)     \
  X(Q4_K, type_id::q4_k, 256, 144, ActivationForm::Q8_256)     \
  X(Q5_K, type_id::q5_k, 256, 176, ActivationForm::Q8_256)     \
  X(Q6_K, type_id::q6_k, 256, 210, ActivationForm::Q8_256)     \
  X(IQ4_NL, type_id::iq4_nl, 32, 18, ActivationForm::Q8_32)    \
  X(IQ4_XS, type_id::iq4_xs, 256, 136, ActivationForm::Q8_256) \
  X(BF16, type_id::bf16, 1, 2, ActivationForm::Float)

enum class WeightType : uint8_t {
#define X(name, id, weights, bytes, form) name = id,
  FERRUM_WEIGHT_TYPES(X)
#undef X
};

struct WeightTypeInfo {
  WeightType type;
  const char* name;
  int block_weights;
  int block_bytes;
  ActivationForm form;
};

inline constexpr WeightTypeInfo weight_types[] = {
#define X(name, id, weights, bytes, form) {WeightType::name, #name, weights, bytes, form},
    FERRUM_WEIGHT_TYPES(X)
#undef X
};
inline constexpr int weight_type_count = sizeof(weight_types) / sizeof(weight_types[0]);

/// Position of a type in `weight_types`; -1 for a ggml type id that ferrum does not compute with.
constexpr int weight_type_index(int ggml_type_id) {
  for (int i = 0; i < weight_type_count; ++i)
    if (static_cast<int>(weight_types[i].type) == ggml_type_id) return i;
  return -1;
}
constexpr const WeightTypeInfo& info(WeightType type) {
  const int index = weight_type_index(static_cast<int>(type));
  return weight_types[index < 0 ? 0 : index];  // every WeightType is in the list
}

/// Bytes of one row of `k` weights; `k` is a multiple of the block.
constexpr size_t row_bytes(WeightType type, int64_t k) {
  return static_cast<size_t>(k / info(type).block_weights) * static_cast<size_t>(info(type).block_bytes);
}

}  // namespace ferrum
