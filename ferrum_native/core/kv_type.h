// The number types that keys and values are kept in.
#pragma once
#include <cstddef>

namespace ferrum {

/// Q8_0: 32 neighbours of a head's dimensions are int8 with one float16 scale, as in the blocks of BlockQ8_0.
enum class KvType { F16, F32, Q8_0 };

constexpr int kv_group = 32;  // dimensions of Q8_0 that share a scale

/// Bytes of the key, or of the value, of one token in one head; of Q8_0 head_dim is a multiple of kv_group.
constexpr size_t kv_row_bytes(KvType type, int head_dim) {
  const auto D = static_cast<size_t>(head_dim);
  return type == KvType::F32 ? 4 * D : type == KvType::F16 ? 2 * D : D / kv_group * (kv_group + 2);
}

}  // namespace ferrum
