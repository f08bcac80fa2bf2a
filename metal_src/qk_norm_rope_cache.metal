// qk_norm_rope_cache: a simdgroup takes one head of one token: a query's, a key's or a value's. A lane holds every 32nd value of the head, and both
// of a rotated pair. Heads are normalised on their own.
#include "rows.h"
#include "shared/qk_norm_rope_cache.h"

using namespace ferrum;
using namespace ferrum::shared;

/// Where the values of a head go: a row of q_out, or the place of a token in a block of the cache.
template <typename Element> struct RotatedHead {
  device float* query;  // of a query
  device Element* key_block;
  int place;
  bool is_query;
};
template <typename Element> inline void put(RotatedHead<Element> head, int d, float value) {
  if (head.is_query)
    head.query[d] = value;
  else
    head.key_block[kv_key_element(head.place, d)] = Element(value);
}

template <typename Element>
kernel void qk_norm_rope_cache(constant QkNormRopeCacheArgs& args [[buffer(0)]],
                               device const float* qkv [[buffer(1)]],
                               device const float* q_norm [[buffer(2)]],
                               device const float* k_norm [[buffer(3)]],
                               device const float* rope_cos_sin [[buffer(4)]],
                               device const int32_t* kv_slots [[buffer(5)]],
                               device const int32_t* count [[buffer(6)]],
                               device Element* keys [[buffer(7)]],
                               device Element* values [[buffer(8)]],
                               device float* q_out [[buffer(9)]],
                               uint3 group [[threadgroup_position_in_grid]],
                               ushort lane [[thread_index_in_simdgroup]],
                               ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const int all_heads = args.heads + 2 * args.kv_heads, size = args.head_dim;
  const int index = int(group.x) * rope_heads + simdgroup_index, token = int(group.y);
  if (index >= all_heads || token >= count[0]) return;  // the whole simdgroup; none meets at a barrier
  device const float* in = qkv + (ulong(token) * ulong(all_heads) + ulong(index)) * ulong(size);
  const bool is_query = index < args.heads, is_value = index >= args.heads + args.kv_heads;
  const int kv_head = is_query ? 0 : is_value ? index - args.heads - args.kv_heads : index - args.heads;
  const int slot = kv_slots[token], place = slot % kv_tokens_of_block;
  const ulong block = kv_block_begin(args.layer, args.blocks, slot / kv_tokens_of_block, args.kv_heads, kv_head, size);
  if (is_value) {
    device Element* out = values + block + place * size;
    for (int d = lane; d < size; d += 32) out[d] = Element(in[d]);
    return;
  }

  RotatedHead<Element> head;
  head.query = q_out + (ulong(token) * ulong(args.heads) + ulong(is_query ? index : 0)) * ulong(size);
  head.key_block = keys + block;
  head.place = place;
  head.is_query = is_query;
  device const float* weight = is_query ? q_norm : k_norm;
  const bool normed = (is_query ? args.has_q_norm : args.has_k_norm) != 0;
  float squares = 0.0f;
  for (int d = lane; d < size; d += 32) squares += in[d] * in[d];
  const float scale = 1.0f / precise::sqrt(simd_sum(squares) / float(size) + args.eps);
  const int half_size = args.rotary_dim / 2;
  device const float* cosines = rope_cos_sin + ulong(token) * ulong(args.rotary_dim);
  device const float* sines = cosines + half_size;
  for (int i = lane; i < half_size; i += 32) {
    const float first = normed ? in[i] * scale * weight[i] : in[i];
    const float second = normed ? in[half_size + i] * scale * weight[half_size + i] : in[half_size + i];
    put(head, i, first * cosines[i] - second * sines[i]);
    put(head, half_size + i, first * sines[i] + second * cosines[i]);
  }
  for (int d = args.rotary_dim + lane; d < size; d += 32) put(head, d, normed ? in[d] * scale * weight[d] : in[d]);
}
template [[host_name("qk_norm_rope_cache_f16")]] kernel decltype(qk_norm_rope_cache<half>) qk_norm_rope_cache<half>;
template [[host_name("qk_norm_rope_cache_f32")]] kernel decltype(qk_norm_rope_cache<float>) qk_norm_rope_cache<float>;
