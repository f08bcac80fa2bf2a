// Where keys and values lie: a buffer of each, [layers, blocks, kv_heads] of blocks of 16 tokens of head_dim elements (f16 or f32, D = head_dim,
// a multiple of 8). Keys of a block: [D / 8, 16 tokens, 8], so that 16 lanes with a token each read neighbouring pieces and a piece is 8 x 8
// values in a row for every half of the tokens. Values of a block: [16 tokens, D].
#pragma once
#include "step.h"

namespace ferrum {
namespace shared {

enum { kv_chunk = 8 };

/// Elements of one block of one head.
inline uint64_t kv_block_elements(int32_t head_dim) { return static_cast<uint64_t>(kv_tokens_of_block * head_dim); }
/// Element at which a block begins.
inline uint64_t kv_block_begin(int32_t layer, int32_t blocks, int32_t block, int32_t kv_heads, int32_t head, int32_t head_dim) {
  const uint64_t index = (static_cast<uint64_t>(layer) * static_cast<uint64_t>(blocks) + static_cast<uint64_t>(block)) * static_cast<uint64_t>(kv_heads) + static_cast<uint64_t>(head);
  return index * kv_block_elements(head_dim);
}
/// Element of dimension d of the key of token `place` within its block.
inline int32_t kv_key_element(int32_t place, int32_t d) { return (d / kv_chunk * kv_tokens_of_block + place) * kv_chunk + d % kv_chunk; }

}  // namespace shared
}  // namespace ferrum
