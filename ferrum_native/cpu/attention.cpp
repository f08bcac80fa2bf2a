#include <cstring>

#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::attend(const AttentionArgs& args, const QueryTile& tile, int kv_head, int split, const ThreadScratch& scratch, float* partial) const {
  const CpuKv& kv = static_cast<const CpuKv&>(args.kv);
  const int group = args.shape.heads / args.shape.kv_heads, D = args.shape.head_dim;
  const int first_position = batch_->positions[static_cast<size_t>(tile.first)];
  kernels_.attention_tile({.q = row(args.q, tile.first) + kv_head * group * D,
                           .q_stride = static_cast<size_t>(args.q.cols),
                           .queries = tile.queries,
                           .group = group,
                           .head_dim = D,
                           .first_position = first_position,
                           .scale = args.scale,
                           .kv_type = kv.shape.type,
                           .keys = kv.keys.host() + kv.offset(args.layer, 0, kv_head),
                           .values = kv.values.host() + kv.offset(args.layer, 0, kv_head),
                           .block_bytes = kv.block_bytes(),
                           .blocks = batch_->block_tables.data() + static_cast<size_t>(tile.sequence) * static_cast<size_t>(batch_->max_blocks),
                           .key_begin = split * split_keys,
                           .key_end = std::min((split + 1) * split_keys, first_position + tile.queries),
                           .q_16 = scratch.q_16,
                           .q_scale = scratch.q_scale,
                           .partial = partial});
}

void CpuBackend::finish_tile(const AttentionArgs& args, const QueryTile& tile, int kv_head, const float* total) const {
  const CpuActivation& out = static_cast<const CpuActivation&>(args.out);
  const int group = args.shape.heads / args.shape.kv_heads, D = args.shape.head_dim;
  for (int i = 0; i < tile.queries; ++i)
    for (int g = 0; g < group; ++g) kernels_.attention_result(total + partial_floats(i * group + g, D), D, out.row(tile.first + i) + (kv_head * group + g) * D);
}

void CpuBackend::attention(const AttentionArgs& args) {
  const Batch& b = *batch_;
  const int kv_heads = args.shape.kv_heads, group = args.shape.heads / kv_heads, D = args.shape.head_dim;
  const int units = static_cast<int>(tiles_.size()) * kv_heads;
  auto splits_of = [&](const QueryTile& tile) { return b.positions[static_cast<size_t>(tile.first + tile.queries - 1)] / split_keys + 1; };
  auto combine = [&](float* total, const float* partial, int rows) {
    for (int r = 0; r < rows; ++r) kernels_.attention_combine(total + partial_floats(r, D), partial + partial_floats(r, D), D);
  };
  int most_splits = 1;
  for (const QueryTile& tile : tiles_) most_splits = std::max(most_splits, splits_of(tile));

  const bool single_tokens = b.tokens == b.sequences;
  if (single_tokens && most_splits > 1 && units < units_to_split_below()) {
    const size_t stride = partial_floats(group, D);
    auto partial_at = [&](int unit, int split) { return split_partials_ + (static_cast<size_t>(unit) * static_cast<size_t>(most_splits) + static_cast<size_t>(split)) * stride; };
    pool_.run(units * most_splits, [&](int task, int thread) {
      const int unit = task / most_splits, split = task % most_splits;
      const QueryTile& tile = tiles_[static_cast<size_t>(unit / kv_heads)];
      if (split < splits_of(tile)) attend(args, tile, unit % kv_heads, split, scratch_[static_cast<size_t>(thread)], partial_at(unit, split));
    });
    pool_.run(units, [&](int unit, int) {
      const QueryTile& tile = tiles_[static_cast<size_t>(unit / kv_heads)];
      for (int split = 1; split < splits_of(tile); ++split) combine(partial_at(unit, 0), partial_at(unit, split), group);
      finish_tile(args, tile, unit % kv_heads, partial_at(unit, 0));
    });
  } else {
    pool_.run(units, [&](int unit, int thread) {
      const QueryTile& tile = tiles_[static_cast<size_t>(unit / kv_heads)];
      const ThreadScratch& scratch = scratch_[static_cast<size_t>(thread)];
      float* total = scratch.attention;
      float* partial = total + partial_floats(query_tile * group, D);
      attend(args, tile, unit % kv_heads, 0, scratch, total);
      for (int split = 1; split < splits_of(tile); ++split) {
        attend(args, tile, unit % kv_heads, split, scratch, partial);
        combine(total, partial, tile.queries * group);
      }
      finish_tile(args, tile, unit % kv_heads, total);
    });
  }
  pack_rows(static_cast<CpuActivation&>(args.out), b.tokens);
}

void CpuBackend::pack_rows(CpuActivation& x, int rows) {
  each_row(rows, x.cols, [&](int i) { x.pack(kernels_, i); });
}

}  // namespace ferrum::cpu
