// attention: keys in order through an online softmax; every threadgroup takes the query heads of one kv head that `attention_group` allows.
#include "fragment.h"
#include "rows.h"
#include "shared/attention.h"

using namespace ferrum;
using namespace ferrum::shared;

constant int head_size [[function_constant(3)]];   // head_dim
constant int group_heads [[function_constant(4)]]; // query heads of a threadgroup

// Loops over arrays run to the most there can be, with a condition that is known when the pipeline is made: so they are unrolled and the arrays are
// registers.
#define FERRUM_EACH_HEAD(g) _Pragma("unroll") for (int g = 0; g < attention_most_group; ++g) if (g < group_heads)
#define FERRUM_EACH_QUAD(j) _Pragma("unroll") for (int j = 0; j < attention_most_quads; ++j) if (128 * j < head_size)
#define FERRUM_EACH_FRAGMENT(c) _Pragma("unroll") for (int c = 0; c < attention_most_fragments; ++c) if (8 * c < head_size)

enum {
  attention_most_quads = attention_most_head_dim / 4 / 32,   // float4 of a head that a lane holds
  attention_most_fragments = attention_most_head_dim / 8
};

struct KeyChunk { float4 low, high; };
inline KeyChunk load_chunk(device const half* at) {
  const uint4 bits = *(device const uint4*)at;
  const uint2 low = bits.xy, high = bits.zw;
  KeyChunk chunk;
  chunk.low = float4(as_type<half4>(low));
  chunk.high = float4(as_type<half4>(high));
  return chunk;
}
inline KeyChunk load_chunk(device const float* at) {
  KeyChunk chunk;
  chunk.low = ((device const float4*)at)[0];
  chunk.high = ((device const float4*)at)[1];
  return chunk;
}
inline float4 load_four(device const half* at) { return float4(*(device const half4*)at); }
inline float4 load_four(device const float* at) { return *(device const float4*)at; }

/// Partial result of `group_heads` heads over the keys that this simdgroup has seen. A lane has float4s lane, lane + 32, ... of each head's values.
struct DecodeState {
  float largest[attention_most_group];
  float sum[attention_most_group];  // of this lane's keys
  float4 values[attention_most_group][attention_most_quads];
};

inline void clear(thread DecodeState& state) {
  FERRUM_EACH_HEAD(g) {
    state.largest[g] = lowest_score;
    state.sum[g] = 0.0f;
    FERRUM_EACH_QUAD(j) state.values[g][j] = float4(0.0f);
  }
}

/// Scores of one key of all heads, which this lane alone computes.
template <typename Element>
inline void score_key(threadgroup const float* q, device const Element* key, thread float* scores) {
  FERRUM_EACH_HEAD(g) scores[g] = 0.0f;
  for (int c = 0; c < head_size / kv_chunk; ++c) {
    const KeyChunk chunk = load_chunk(key + c * kv_tokens_of_block * kv_chunk);
    FERRUM_EACH_HEAD(g) {
      threadgroup const float4* q_chunk = (threadgroup const float4*)(q + g * head_size) + 2 * c;
      scores[g] += dot(q_chunk[0], chunk.low) + dot(q_chunk[1], chunk.high);
    }
  }
}

/// Turns the scores of 32 keys into weights [group_heads, 32] in threadgroup memory.
inline void weigh_keys(thread DecodeState& state, thread const float* scores, float scale, bool visible, threadgroup float* weights, ushort lane) {
  FERRUM_EACH_HEAD(g) {
    const float score = visible ? scores[g] * scale : lowest_score;
    const float largest = max(state.largest[g], simd_max(score));
    const float keep = exp_below_zero(state.largest[g] - largest);
    const float weight = visible ? exp_below_zero(score - largest) : 0.0f;
    state.largest[g] = largest;
    state.sum[g] = state.sum[g] * keep + weight;
    FERRUM_EACH_QUAD(j) state.values[g][j] *= keep;
    weights[32 * g + lane] = weight;
  }
}

/// Adds `tokens` values of one block, weighted with weights[32 g + token].
template <typename Element>
inline void add_values(thread DecodeState& state, device const Element* block, int tokens, threadgroup const float* weights, ushort lane) {
  for (int token = 0; token < tokens; ++token)
    FERRUM_EACH_QUAD(j) {
      const int d = 128 * j + 4 * lane;
      if (d >= head_size) continue;  // the last of a head that is no multiple of 128
      const float4 value = load_four(block + token * head_size + d);
      FERRUM_EACH_HEAD(g) state.values[g][j] += weights[32 * g + token] * value;
    }
}

// A threadgroup takes one split of the context of one decode tile; its simdgroups take 32 keys in turn. For scores a lane holds a key, for values
// every 32nd float4 of a head. The simdgroups' results are added in order.
template <typename Element>
kernel void attention_decode(constant AttentionArgs& args [[buffer(0)]],
                             device const Step& step [[buffer(1)]],
                             device const QueryTile* tiles [[buffer(2)]],
                             device const int32_t* block_tables [[buffer(3)]],
                             device const float* q [[buffer(4)]],
                             device const Element* keys [[buffer(5)]],
                             device const Element* values [[buffer(6)]],
                             device float* partial_values [[buffer(7)]],
                             device float* partial_stats [[buffer(8)]],
                             device float* out [[buffer(9)]],
                             threadgroup float* memory [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort thread_index [[thread_index_in_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]],
                             ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const int tile = int(group.y), split = int(group.z);
  if (tile >= step.decode_tiles) return;  // the whole threadgroup, as below
  const int context = tiles[tile].position + 1, length = attention_split_length(context), begin = split * length, end = min(begin + length, context);
  if (begin >= end) return;
  const int first_head = int(group.x) * group_heads, kv_head = first_head / (args.heads / args.kv_heads);
  device const int32_t* table = block_tables + ulong(tiles[tile].sequence) * ulong(step.max_blocks);
  const ulong first_value = (ulong(tiles[tile].first) * ulong(args.heads) + ulong(first_head)) * ulong(head_size);

  threadgroup float* heads = memory;  // q, later the merged values
  threadgroup float* weights = memory + group_heads * head_size + simdgroup_index * group_heads * 32;
  threadgroup float* stats = memory + group_heads * head_size + attention_decode_simdgroups * group_heads * 32;
  for (int i = thread_index; i < group_heads * head_size; i += attention_decode_threads) heads[i] = q[first_value + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);

  DecodeState state;
  clear(state);
  for (int first = begin + 32 * simdgroup_index; first < end; first += attention_decode_threads) {
    const int key = first + lane;
    const bool visible = key < end;
    float scores[attention_most_group];
    if (visible) {
      const ulong block = kv_block_begin(args.layer, args.blocks, table[key / kv_tokens_of_block], args.kv_heads, kv_head, head_size);
      score_key(heads, keys + block + key % kv_tokens_of_block * kv_chunk, scores);
    }
    weigh_keys(state, scores, args.scale, visible, weights, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int half_first = first; half_first < min(first + 32, end); half_first += kv_tokens_of_block) {
      const ulong block = kv_block_begin(args.layer, args.blocks, table[half_first / kv_tokens_of_block], args.kv_heads, kv_head, head_size);
      add_values(state, values + block, min(int(kv_tokens_of_block), end - half_first), weights + (half_first - first), lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  FERRUM_EACH_HEAD(g) {
    const float sum = simd_sum(state.sum[g]);
    if (lane == 0) {
      stats[(simdgroup_index * group_heads + g) * 2] = state.largest[g];
      stats[(simdgroup_index * group_heads + g) * 2 + 1] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool whole = length >= context;
  const ulong partial = (ulong(tile) * ulong(args.heads) + ulong(first_head)) * ulong(args.splits) + ulong(split);  // of the first head
  FERRUM_EACH_HEAD(g) {
    float largest = stats[2 * g];
    for (int s = 1; s < attention_decode_simdgroups; ++s) largest = max(largest, stats[(s * group_heads + g) * 2]);
    float sum = 0.0f;
    for (int s = 0; s < attention_decode_simdgroups; ++s) sum += stats[(s * group_heads + g) * 2 + 1] * exp_below_zero(stats[(s * group_heads + g) * 2] - largest);
    const float factor = exp_below_zero(state.largest[g] - largest) * (whole ? 1.0f / sum : 1.0f);
    FERRUM_EACH_QUAD(j) state.values[g][j] *= factor;
    if (!whole && thread_index == 0) {
      partial_stats[2 * (partial + ulong(g) * ulong(args.splits))] = largest;
      partial_stats[2 * (partial + ulong(g) * ulong(args.splits)) + 1] = sum;
    }
  }
  for (int s = 0; s < attention_decode_simdgroups; ++s) {
    if (simdgroup_index == s)
      FERRUM_EACH_HEAD(g)
        FERRUM_EACH_QUAD(j) {
          const int d = 128 * j + 4 * lane;
          if (d >= head_size) continue;
          threadgroup float4* merged = (threadgroup float4*)(heads + g * head_size + d);
          if (s == 0)
            *merged = state.values[g][j];
          else
            *merged += state.values[g][j];
        }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int i = thread_index; i < group_heads * head_size; i += attention_decode_threads) {
    const int g = i / head_size, d = i % head_size;
    if (whole)
      out[first_value + i] = heads[i];
    else
      partial_values[(partial + ulong(g) * ulong(args.splits)) * ulong(head_size) + d] = heads[i];
  }
}
template [[host_name("attention_decode_f16")]] kernel decltype(attention_decode<half>) attention_decode<half>;
template [[host_name("attention_decode_f32")]] kernel decltype(attention_decode<float>) attention_decode<float>;

// A simdgroup combines the splits of one head of one decode tile; lane s has the weight of split s.
kernel void attention_combine(constant AttentionArgs& args [[buffer(0)]],
                              device const Step& step [[buffer(1)]],
                              device const QueryTile* tiles [[buffer(2)]],
                              device const float* partial_values [[buffer(3)]],
                              device const float* partial_stats [[buffer(4)]],
                              device float* out [[buffer(5)]],
                              uint3 group [[threadgroup_position_in_grid]],
                              ushort lane [[thread_index_in_simdgroup]]) {
  const int head = int(group.x), tile = int(group.y), size = args.head_dim;
  if (tile >= step.decode_tiles) return;
  const int splits = attention_splits(tiles[tile].position + 1);
  if (splits == 1) return;  // attention_decode has written the result
  const ulong first = (ulong(tile) * ulong(args.heads) + ulong(head)) * ulong(args.splits);
  float largest = lowest_score, sum = 0.0f;
  if (lane < splits) {
    largest = partial_stats[2 * (first + lane)];
    sum = partial_stats[2 * (first + lane) + 1];
  }
  const float largest_of_all = simd_max(largest), weight = lane < splits ? exp_below_zero(largest - largest_of_all) : 0.0f;
  const float share = weight / simd_sum(weight * sum);
  device float* out_head = out + (ulong(tiles[tile].first) * ulong(args.heads) + ulong(head)) * ulong(size);
  for (int begin = 0; begin < size; begin += 128) {
    const int d = begin + 4 * lane;
    float4 total = float4(0.0f);
    for (int s = 0; s < splits; ++s) {
      const float share_of_split = simd_broadcast(share, ushort(s));
      if (d < size) total += share_of_split * *(device const float4*)(partial_values + (first + ulong(s)) * ulong(size) + d);
    }
    if (d < size) *(device float4*)(out_head + d) = total;
  }
}

// A simdgroup takes 8 (query, head) rows of a prompt tile, row r being head r % group_heads of query r / group_heads, through the blocks of 16 keys up
// to its last query's own. A lane holds two neighbouring elements of one row of every 8x8 matrix. Simdgroups never meet.
template <typename Element>
kernel void attention_prompt(constant AttentionArgs& args [[buffer(0)]],
                             device const Step& step [[buffer(1)]],
                             device const QueryTile* tiles [[buffer(2)]],
                             device const int32_t* block_tables [[buffer(3)]],
                             device const float* q [[buffer(4)]],
                             device const Element* keys [[buffer(5)]],
                             device const Element* values [[buffer(6)]],
                             device float* out [[buffer(7)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort lane [[thread_index_in_simdgroup]],
                             ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  if (int(group.y) >= step.prompt_tiles) return;
  const int tile = step.decode_tiles + int(group.y), rows = tiles[tile].tokens * group_heads, first_row = 8 * simdgroup_index;
  if (first_row >= rows) return;  // the whole simdgroup
  const int first_head = int(group.x) * group_heads, kv_head = first_head / (args.heads / args.kv_heads);
  device const int32_t* table = block_tables + ulong(tiles[tile].sequence) * ulong(step.max_blocks);
  const ushort matrix_row = fragment_row(lane), column = fragment_column(lane);
  const int row = min(first_row + matrix_row, rows - 1);  // rows that do not exist repeat the last: computed, not stored
  const int position = tiles[tile].position + row / group_heads, last_position = tiles[tile].position + min(first_row + 7, rows - 1) / group_heads;
  const ulong first_value = (ulong(tiles[tile].first + row / group_heads) * ulong(args.heads) + ulong(first_head + row % group_heads)) * ulong(head_size) + column;

  simdgroup_float8x8 queries[attention_most_fragments], mixed[attention_most_fragments];
  FERRUM_EACH_FRAGMENT(c) {
    queries[c] = make_fragment(q[first_value + 8 * c], q[first_value + 8 * c + 1]);
    mixed[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  float largest = lowest_score, sum = 0.0f;  // `sum`: of this lane's keys
  for (int begin = 0; begin <= last_position; begin += kv_tokens_of_block) {
    const ulong block = kv_block_begin(args.layer, args.blocks, table[begin / kv_tokens_of_block], args.kv_heads, kv_head, head_size);
    device const Element* block_keys = keys + block;
    device const Element* block_values = values + block;
    simdgroup_float8x8 scores[2];
    for (int h = 0; h < 2; ++h) scores[h] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    FERRUM_EACH_FRAGMENT(c)
      for (int h = 0; h < 2; ++h) {
        device const Element* at = block_keys + kv_key_element(8 * h + column, 8 * c + matrix_row);  // dimension by key
        const simdgroup_float8x8 key = make_fragment(float(at[0]), float(at[kv_chunk]));
        simdgroup_multiply_accumulate(scores[h], queries[c], key, scores[h]);
      }
    float block_scores[4];
    float block_largest = lowest_score;
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = begin + 8 * (i / 2) + column + i % 2;
      block_scores[i] = key <= position ? scores[i / 2].thread_elements()[i % 2] * args.scale : lowest_score;
      block_largest = max(block_largest, block_scores[i]);
    }
    const float now = max(largest, fragment_row_max(block_largest)), keep = exp_below_zero(largest - now);
    largest = now;
    sum *= keep;
    float weights[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = begin + 8 * (i / 2) + column + i % 2;
      weights[i] = key <= position ? exp_below_zero(block_scores[i] - now) : 0.0f;
      sum += weights[i];
    }
    const simdgroup_float8x8 weights_0 = make_fragment(weights[0], weights[1]), weights_1 = make_fragment(weights[2], weights[3]);
    // Past the last query there may be anything, even NaN.
    const bool seen_0 = begin + matrix_row <= last_position, seen_1 = begin + 8 + matrix_row <= last_position;
    FERRUM_EACH_FRAGMENT(c) {
      device const Element* at = block_values + matrix_row * head_size + 8 * c + column;  // key by dimension
      const simdgroup_float8x8 values_0 = make_fragment(seen_0 ? float(at[0]) : 0.0f, seen_0 ? float(at[1]) : 0.0f);
      const simdgroup_float8x8 values_1 = make_fragment(seen_1 ? float(at[8 * head_size]) : 0.0f, seen_1 ? float(at[8 * head_size + 1]) : 0.0f);
      simdgroup_float8x8 kept = make_fragment(mixed[c].thread_elements()[0] * keep, mixed[c].thread_elements()[1] * keep);
      simdgroup_multiply_accumulate(kept, weights_0, values_0, kept);
      simdgroup_multiply_accumulate(mixed[c], weights_1, values_1, kept);
    }
  }
  const float scale = 1.0f / fragment_row_sum(sum);
  if (first_row + matrix_row >= rows) return;
  FERRUM_EACH_FRAGMENT(c) {
    out[first_value + 8 * c] = mixed[c].thread_elements()[0] * scale;
    out[first_value + 8 * c + 1] = mixed[c].thread_elements()[1] * scale;
  }
}
template [[host_name("attention_prompt_f16")]] kernel decltype(attention_prompt<half>) attention_prompt<half>;
template [[host_name("attention_prompt_f32")]] kernel decltype(attention_prompt<float>) attention_prompt<float>;
