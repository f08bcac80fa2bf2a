#include <cstring>

#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::attend(const AttentionArgs& args, const QueryTile& tile, int split, float* partial) const {
  const CpuKv& kv = static_cast<const CpuKv&>(args.kv);
  const int group = args.shape.heads / args.shape.kv_heads, D = args.shape.head_dim;
  const int first_position = batch_->positions[static_cast<size_t>(tile.first)];
  kernels_.attention_tile({.q = row(args.q, tile.first) + tile.kv_head * group * D,
                           .q_stride = static_cast<size_t>(args.q.cols),
                           .queries = tile.queries,
                           .group = group,
                           .head_dim = D,
                           .first_position = first_position,
                           .scale = args.scale,
                           .f16 = kv.shape.type == KvType::F16,
                           .keys = kv.keys.host() + kv.offset(args.layer, 0, tile.kv_head),
                           .values = kv.values.host() + kv.offset(args.layer, 0, tile.kv_head),
                           .block_bytes = kv.block_bytes(),
                           .blocks = batch_->block_tables.data() + static_cast<size_t>(tile.sequence) * static_cast<size_t>(batch_->max_blocks),
                           .key_begin = split * split_keys,
                           .key_end = std::min((split + 1) * split_keys, first_position + tile.queries),
                           .partial = partial});
}

void CpuBackend::finish_tile(const AttentionArgs& args, const QueryTile& tile, const float* total) const {
  const CpuActivation& out = static_cast<const CpuActivation&>(args.out);
  const int group = args.shape.heads / args.shape.kv_heads, D = args.shape.head_dim;
  for (int i = 0; i < tile.queries; ++i)
    for (int g = 0; g < group; ++g) kernels_.attention_result(total + partial_floats(i * group + g, D), D, out.row(tile.first + i) + (tile.kv_head * group + g) * D);
}

void CpuBackend::attention(const AttentionArgs& args) {
  const Batch& b = *batch_;
  const int kv_heads = args.shape.kv_heads, group = args.shape.heads / kv_heads, D = args.shape.head_dim;
  auto splits_of = [&](const QueryTile& tile) { return b.positions[static_cast<size_t>(tile.first + tile.queries - 1)] / split_keys + 1; };
  auto combine = [&](float* total, const float* partial, int rows) {
    for (int r = 0; r < rows; ++r) kernels_.attention_combine(total + partial_floats(r, D), partial + partial_floats(r, D), D);
  };

  int tiles = 0, most_splits = 1, most_queries = 1;
  for (int s = 0; s < b.sequences; ++s) {
    const int queries = b.query_start[static_cast<size_t>(s) + 1] - b.query_start[static_cast<size_t>(s)];
    tiles += (queries + query_tile - 1) / query_tile;
    most_queries = std::max(most_queries, queries);
    most_splits = std::max(most_splits, (b.context_length[static_cast<size_t>(s)] - 1) / split_keys + 1);
  }
  auto tile_at = [&](int unit) {  // longest contexts of a prompt first
    QueryTile tile{0, 0, 0, unit % kv_heads};
    int index = unit / kv_heads;
    for (;; ++tile.sequence) {
      const int start = b.query_start[static_cast<size_t>(tile.sequence)], end = b.query_start[static_cast<size_t>(tile.sequence) + 1];
      const int count = (end - start + query_tile - 1) / query_tile;
      if (index >= count) {
        index -= count;
        continue;
      }
      tile.first = start + (count - 1 - index) * query_tile;
      tile.queries = std::min(query_tile, end - tile.first);
      return tile;
    }
  };

  const int units = tiles * kv_heads;
  if (most_queries == 1 && most_splits > 1 && units < 4 * pool_.threads()) {
    const size_t stride = partial_floats(group, D);
    auto partial_at = [&](int unit, int split) { return split_partials_ + (static_cast<size_t>(unit) * static_cast<size_t>(most_splits) + static_cast<size_t>(split)) * stride; };
    pool_.run(units * most_splits, [&](int task, int) {
      const QueryTile tile = tile_at(task / most_splits);
      if (task % most_splits < splits_of(tile)) attend(args, tile, task % most_splits, partial_at(task / most_splits, task % most_splits));
    });
    pool_.run(units, [&](int unit, int) {
      const QueryTile tile = tile_at(unit);
      for (int split = 1; split < splits_of(tile); ++split) combine(partial_at(unit, 0), partial_at(unit, split), group);
      finish_tile(args, tile, partial_at(unit, 0));
    });
  } else {
    pool_.run(units, [&](int unit, int thread) {
      const QueryTile tile = tile_at(unit);
      float* total = scratch_[static_cast<size_t>(thread)].attention;
      float* partial = total + partial_floats(query_tile * group, D);
      attend(args, tile, 0, total);
      for (int split = 1; split < splits_of(tile); ++split) {
        attend(args, tile, split, partial);
        combine(total, partial, tile.queries * group);
      }
      finish_tile(args, tile, total);
    });
  }
  pack_rows(static_cast<CpuActivation&>(args.out), b.tokens);
}

void CpuBackend::pack_rows(CpuActivation& x, int rows) {
  each_row(rows, x.cols, [&](int i) { x.pack(kernels_, i); });
}

}  // namespace ferrum::cpu
