// qk_norm_rope_cache: splits q, k and v, normalises and rotates q and k (NEOX pairs: i with i + rotary_dim / 2), writes k and v to the tokens' slots.
//
// kernel                  buffers after args                                                              grid (threadgroups)                                         threads
// qk_norm_rope_cache_f16  qkv float [T, (heads + 2 kv_heads) D]; q_norm float [D]; k_norm float [D]       (ceil((heads + 2 kv_heads) / rope_heads), tokens)           rope_threads
// qk_norm_rope_cache_f32  (any buffer where there is none); rope_cos_sin float [T, rotary_dim];
//                         kv_slots int32 [T]; count; keys; values (kv_layout.h, elements of the
//                         name's type); q_out float [T, heads D]
#pragma once
#include "kv_layout.h"

namespace ferrum {
namespace shared {

enum { rope_heads = 4, rope_threads = 32 * rope_heads };  // a simdgroup takes one head

struct QkNormRopeCacheArgs {
  int32_t heads, kv_heads, head_dim, rotary_dim;
  int32_t has_q_norm, has_k_norm;
  float eps;
  int32_t layer, blocks;  // of the KV buffers: blocks of a layer
};
static_assert(sizeof(QkNormRopeCacheArgs) == 36, "QkNormRopeCacheArgs is packed");

}  // namespace shared
}  // namespace ferrum
