// Keys and values between the blocks of a device and one array of a sequence, as files hold it: [layers, 2, tokens, heads, head_dim], keys first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "backend.h"

namespace ferrum {

/// Calls move(element in the blocks, element of the array) for each. `keys` and `values` are [layer][block][head][16 head_dim elements];
/// key_element(place, d) is where dimension d of the key of a block's token lies, and values lie [16 tokens][head_dim].
template <class T, class Array, class KeyElement, class Move>
void move_kv(const KvShape& s, T* keys, T* values, std::span<const int32_t> blocks, int tokens, Array* array, KeyElement key_element, Move move) {
  const auto D = static_cast<size_t>(s.head_dim), H = static_cast<size_t>(s.heads), B = static_cast<size_t>(s.blocks);
  for (size_t layer = 0; layer < static_cast<size_t>(s.layers); ++layer)
    for (T* side : {keys, values})
      for (int t = 0; t < tokens; ++t) {
        const int place = t % kv_block_tokens;
        T* head = side + (layer * B + static_cast<size_t>(blocks[static_cast<size_t>(t / kv_block_tokens)])) * H * D * kv_block_tokens;
        for (size_t h = 0; h < H; ++h, head += D * kv_block_tokens)
          for (size_t d = 0; d < D; ++d) move(head[side == keys ? static_cast<size_t>(key_element(place, static_cast<int>(d))) : static_cast<size_t>(place) * D + d], *array++);
      }
}

/// `read_kv` and `write_kv` of f16 and f32 on a device whose blocks the host sees.
template <class KeyElement>
void read_kv_blocks(const KvShape& s, const std::byte* keys, const std::byte* values, std::span<const int32_t> blocks, int tokens, std::byte* out, KeyElement key_element) {
  auto read = [&]<class T>(T* array) {
    move_kv(s, reinterpret_cast<const T*>(keys), reinterpret_cast<const T*>(values), blocks, tokens, array, key_element, [](const T& inside, T& outside) { outside = inside; });
  };
  s.type == KvType::F16 ? read(reinterpret_cast<uint16_t*>(out)) : read(reinterpret_cast<uint32_t*>(out));
}
template <class KeyElement>
void write_kv_blocks(const KvShape& s, std::byte* keys, std::byte* values, std::span<const int32_t> blocks, int tokens, const std::byte* data, KeyElement key_element) {
  auto write = [&]<class T>(const T* array) {
    move_kv(s, reinterpret_cast<T*>(keys), reinterpret_cast<T*>(values), blocks, tokens, array, key_element, [](T& inside, const T& outside) { inside = outside; });
  };
  s.type == KvType::F16 ? write(reinterpret_cast<const uint16_t*>(data)) : write(reinterpret_cast<const uint32_t*>(data));
}

}  // namespace ferrum
