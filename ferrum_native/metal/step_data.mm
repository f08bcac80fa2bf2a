#include "step_data.h"

#include <algorithm>
#include <cstring>

namespace ferrum::metal {

shared::StepLayout StepData::layout(const StepLimits& l) {
  const auto blocks = static_cast<size_t>((l.context + kv_block_tokens - 1) / kv_block_tokens);
  return shared::step_layout(static_cast<size_t>(l.tokens), static_cast<size_t>(l.sequences), static_cast<size_t>(l.logit_rows), blocks, static_cast<size_t>(l.heads.head_dim));
}

void StepData::reserve(const StepLimits& limits) {
  layout_ = layout(limits);
  room_.reserve(layout_.bytes);
  group_ = shared::attention_group(limits.heads.heads / limits.heads.kv_heads);
  *room_.host<shared::Step>(layout_.step) = {};
}

void StepData::write(const Batch& b) {
  shared::Step step{b.tokens, b.sequences, b.logit_count(), b.max_blocks, 0, 0, 0, 0};
  auto copy = [&](size_t offset, const auto& values) { std::copy(values.begin(), values.end(), room_.host<std::decay_t<decltype(values[0])>>(offset)); };
  copy(layout_.token_ids, b.token_ids);
  copy(layout_.kv_slots, b.kv_slots);
  copy(layout_.block_tables, b.block_tables);
  copy(layout_.logit_rows, b.logit_rows);
  copy(layout_.rope_cos_sin, b.rope_cos_sin);
  const shared::QueryTile* tiles = room_.host<shared::QueryTile>(layout_.query_tiles);
  shared::make_query_tiles(b.query_start.data(), b.positions.data(), shared::attention_queries_per_tile(group_), step, room_.host<shared::QueryTile>(layout_.query_tiles));
  splits_ = 1;
  for (int32_t i = 0; i < step.decode_tiles; ++i) splits_ = std::max(splits_, shared::attention_splits(tiles[i].position + 1));
  *room_.host<shared::Step>(layout_.step) = step;
}

void StepData::write_rows(int rows) { room_.host<shared::Step>(layout_.step)->any_rows = rows; }

}  // namespace ferrum::metal
