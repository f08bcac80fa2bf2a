// Weight types of GGUF files: the block layouts and the one list of types that ferrum computes with.
// Layouts as defined by ggml (ggml-common.h of the GGUF format's reference implementation); all little endian.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ferrum {

/// 32 weights: w = d * q.
struct BlockQ8_0 {
  uint16_t d;  // f16
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

/// 256 weights in 8 sub-blocks of 32: w = d * scale[s] * q - dmin * min[s].
/// `q`: byte 32 j + i holds weight i of sub-block 2 j in its low nibble and of sub-block 2 j + 1 in its high nibble.
/// `scales`: 8 six-bit scales and 8 six-bit mins. For s < 4: scale[s] = scales[s] & 63, min[s] = scales[s + 4] & 63;
/// for s >= 4: scale[s] = (scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4, min[s] = (scales[s + 4] >> 4) | (scales[s] >> 6) << 4.
struct BlockQ4_K {
  uint16_t d, dmin;  // f16
  uint8_t scales[12];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

/// 256 weights in 16 sub-blocks of 16: w = d * scales[s] * (q - 32), q in 0..63.
/// Half h (128 weights), group g of 32 in it, lane l: low four bits are in ql[64 h + 32 (g & 1) + l] (low nibble for g < 2, high
/// nibble for g >= 2), the two high bits are bits 2 g of qh[32 h + l]. 2-byte aligned only.
struct BlockQ6_K {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;  // f16
};
static_assert(sizeof(BlockQ6_K) == 210);

/// How the activations of a product with a weight type are packed.
enum class ActivationForm : uint8_t {
  Float,   // float values as they are
  Q8_32,   // int8, one float scale for each 32 values
  Q8_256,  // int8, one float scale for each 256 values, and sums of 16
};

// name, ggml type id, weights in a block, bytes of a block, activation form of its int8 product
#define FERRUM_WEIGHT_TYPES(X)                      \
  X(F32, 0, 1, 4, ActivationForm::Float)            \
  X(F16, 1, 1, 2, ActivationForm::Float)            \
  X(Q8_0, 8, 32, 34, ActivationForm::Q8_32)         \
  X(Q4_K, 12, 256, 144, ActivationForm::Q8_256)     \
  X(Q6_K, 14, 256, 210, ActivationForm::Q8_256)     \
  X(BF16, 30, 1, 2, ActivationForm::Float)

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
