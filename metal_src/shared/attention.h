// attention: ragged, paged, causal, grouped queries. Sequences with one token in the step are decoded: their context is split, the parts are
// combined. Longer chunks are tiled over queries. Keys and values are read once for `attention_group` query heads of a tile.
//
// kernel                        buffers after args                                                     grid (threadgroups)                             threads
// attention_decode_f16, _f32    step; query_tiles; block_tables; q float [T, heads D]; keys; values;   (heads / group, decode_tiles, splits)           attention_decode_threads
//                               partial_values float [decode_tiles, heads, splits, D];                 threadgroup 0: attention_decode_threadgroup_bytes
//                               partial_stats float [decode_tiles, heads, splits, 2];
//                               out float [T, heads D]
// attention_combine             step; query_tiles; partial_values; partial_stats; out                  (heads, decode_tiles)                           attention_combine_threads
//                               needed where a decode tile has more than one split; after attention_decode
// attention_prompt_f16, _f32    step; query_tiles; block_tables; q; keys; values; out                  (heads / group, prompt_tiles)                   attention_prompt_threads
//
// group = attention_group(heads / kv_heads). splits: the step's most of attention_splits(position + 1) over its decode tiles, or more; the same for
// decode and combine (args.splits). Buffers that serve any step up to a context: attention_splits_up_to(context).
// A tile with one split is written to `out` at once. prompt tiles have at most attention_queries_per_tile(group) tokens.
// Function constants, int, for decode and prompt: 3 head_dim (a multiple of 8 up to 512), 4 group.
#pragma once
#include "kv_layout.h"

namespace ferrum {
namespace shared {

enum {
  attention_most_head_dim = 512,
  attention_most_group = 8,
  attention_split_tokens = 256,  // of the shortest split
  attention_most_splits = 32,
  attention_decode_simdgroups = 4, attention_decode_threads = 32 * attention_decode_simdgroups,
  attention_combine_threads = 32,
  attention_prompt_simdgroups = 4, attention_prompt_threads = 32 * attention_prompt_simdgroups,
  attention_prompt_rows = 8 * attention_prompt_simdgroups  // (query, head) pairs of a threadgroup
};

struct AttentionArgs {
  int32_t heads, kv_heads, head_dim;
  float scale;
  int32_t layer, blocks;  // of the KV buffers: blocks of a layer
  int32_t splits;         // third dimension of the partial buffers
};
static_assert(sizeof(AttentionArgs) == 28, "AttentionArgs is packed");

/// Query heads that a threadgroup takes together, of `heads_per_kv_head`: the largest divisor that its registers hold.
inline int32_t attention_group(int32_t heads_per_kv_head) {
  int32_t group = heads_per_kv_head < attention_most_group ? heads_per_kv_head : static_cast<int32_t>(attention_most_group);
  while (heads_per_kv_head % group != 0) --group;
  return group;
}
inline int32_t attention_queries_per_tile(int32_t group) { return attention_prompt_rows / group; }

/// Keys of each split of a context: it depends on the sequence's own length alone, and so do the bits of its result.
inline int32_t attention_split_length(int32_t context) {
  const int32_t most = attention_split_tokens * attention_most_splits;
  return attention_split_tokens * ((context + most - 1) / most);
}
inline int32_t attention_splits(int32_t context) {
  const int32_t length = attention_split_length(context);
  return (context + length - 1) / length;
}
/// Most of the splits of any context up to this one; longer contexts can have fewer than shorter ones.
inline int32_t attention_splits_up_to(int32_t context) {
  const int32_t splits = (context + attention_split_tokens - 1) / attention_split_tokens;
  return splits < attention_most_splits ? splits : static_cast<int32_t>(attention_most_splits);
}

/// q or merged values [group, D]; weights [simdgroups, group, 32]; largest score and sum [simdgroups, group, 2].
inline int32_t attention_decode_threadgroup_bytes(int32_t group, int32_t head_dim) {
  return (4 * (group * head_dim + attention_decode_simdgroups * group * 34) + 15) / 16 * 16;
}

}  // namespace shared
}  // namespace ferrum
