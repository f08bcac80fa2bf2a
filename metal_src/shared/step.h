// What changes from step to step: one buffer, written by `begin`, read by the kernels of every layer.
//
// A batch buffer holds at the offsets of a StepLayout, which depend on the engine's limits only, so that a recorded step can run again:
//   step          Step
//   token_ids     int32 [T]
//   kv_slots      int32 [T], block * kv_block_tokens + position % kv_block_tokens
//   query_tiles   QueryTile [decode_tiles + prompt_tiles], those of sequences with one token first
//   block_tables  int32 [S, max_blocks], -1 where the sequence has no block
//   logit_rows    int32 [L], rising
//   rope_cos_sin  float [T, rotary_dim]: cos of each pair's angle, then sin of each
// `count` in the lists of kernels' buffers is one int32 of Step (tokens, logit_rows or any_rows), bound by its offset: the rows n of the call.
// Grids are sized for this step or larger; threadgroups past the counts do nothing.
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { kv_tokens_of_block = 16 };  // kv_block_tokens of core/batch.h

struct Step {
  int32_t tokens, sequences, logit_rows;  // T, S, L
  int32_t max_blocks;                     // columns of block_tables in this step
  int32_t decode_tiles, prompt_tiles;     // of query_tiles
  int32_t any_rows;                       // `count` of ops that run by themselves, outside of a step
  int32_t unused;
};
static_assert(sizeof(Step) == 32, "Step is packed");

/// Neighbouring tokens of one sequence, which attention takes together.
struct QueryTile {
  int32_t sequence;
  int32_t first, tokens;  // of the batch's tokens
  int32_t position;       // of `first`; the others follow
};
static_assert(sizeof(QueryTile) == 16, "QueryTile is packed");

#ifndef __METAL_VERSION__

/// Offsets in bytes, each a multiple of 256, and the buffer's size.
struct StepLayout { size_t step, token_ids, kv_slots, query_tiles, block_tables, logit_rows, rope_cos_sin, bytes; };

/// Of steps with at most these counts.
inline StepLayout step_layout(size_t tokens, size_t sequences, size_t logit_rows, size_t max_blocks, size_t rotary_dim) {
  StepLayout layout{};
  auto place = [&](size_t& at, size_t bytes) {
    at = layout.bytes;
    layout.bytes += (bytes + 255) / 256 * 256;
  };
  place(layout.step, sizeof(Step));
  place(layout.token_ids, 4 * tokens);
  place(layout.kv_slots, 4 * tokens);
  place(layout.query_tiles, sizeof(QueryTile) * tokens);
  place(layout.block_tables, 4 * sequences * max_blocks);
  place(layout.logit_rows, 4 * logit_rows);
  place(layout.rope_cos_sin, 4 * tokens * rotary_dim);
  return layout;
}

/// Cuts the sequences into tiles of at most `queries_per_tile` tokens (attention.h), at most one tile a token; sets the tile counts of `step`.
inline void make_query_tiles(const int32_t* query_start, const int32_t* positions, int32_t queries_per_tile, Step& step, QueryTile* tiles) {
  int32_t made = 0;
  for (int32_t s = 0; s < step.sequences; ++s)
    if (query_start[s + 1] - query_start[s] == 1) tiles[made++] = {s, query_start[s], 1, positions[query_start[s]]};
  step.decode_tiles = made;
  for (int32_t s = 0; s < step.sequences; ++s) {
    const int32_t end = query_start[s + 1];
    for (int32_t first = query_start[s]; end - query_start[s] > 1 && first < end; first += queries_per_tile)
      tiles[made++] = {s, first, end - first < queries_per_tile ? end - first : queries_per_tile, positions[first]};
  }
  step.prompt_tiles = made - step.decode_tiles;
}

#endif

}  // namespace shared
}  // namespace ferrum
