// The ops over rows: norm, rotation and cache, attention, routing, gathering, block copies.
#include <cstring>

#include "../../metal_src/shared/gather_rows.h"
#include "../../metal_src/shared/kv_blocks.h"
#include "../../metal_src/shared/norm.h"
#include "../../metal_src/shared/qk_norm_rope_cache.h"
#include "../../metal_src/shared/route.h"
#include "metal_backend.h"

namespace ferrum::metal {
namespace {

bool is_f16(const MetalKv& kv) { return kv.shape.type == KvType::F16; }

}  // namespace

void MetalBackend::norm(const NormArgs& a) {
  const shared::NormArgs args{a.residual.cols, a.eps, a.delta != nullptr};
  encode({"norm"}, args, {place(a.residual), place(a.delta ? *a.delta : a.residual), place(a.weight), count_of(a.rows), place(a.out)},
         {{static_cast<size_t>(a.rows)}, shared::norm_threads(args.cols), shared::norm_threadgroup_bytes});
}

void MetalBackend::qk_norm_rope_cache(const QkNormRopeCacheArgs& a) {
  const MetalKv& kv = static_cast<const MetalKv&>(a.kv);
  const HeadShape& s = a.shape;
  const shared::QkNormRopeCacheArgs args{s.heads, s.kv_heads, s.head_dim, a.rotary_dim, a.q_norm != nullptr, a.k_norm != nullptr, a.eps, a.layer, kv.shape.blocks};
  const Place qkv = place(a.qkv);
  encode({is_f16(kv) ? "qk_norm_rope_cache_f16" : "qk_norm_rope_cache_f32"}, args,
         {qkv, a.q_norm ? place(*a.q_norm) : qkv, a.k_norm ? place(*a.k_norm) : qkv, step_.rope_cos_sin(), step_.kv_slots(), step_.tokens(), place(kv.keys), place(kv.values), place(a.q_out)},
         {{groups_for(s.heads + 2 * s.kv_heads, shared::rope_heads), static_cast<size_t>(step_.step().tokens)}, shared::rope_threads});
}

void MetalBackend::attention(const AttentionArgs& a) {
  const MetalKv& kv = static_cast<const MetalKv&>(a.kv);
  const int heads = a.shape.heads, D = a.shape.head_dim, group = step_.group(), splits = step_.splits();
  const auto decode_tiles = static_cast<size_t>(step_.step().decode_tiles), prompt_tiles = static_cast<size_t>(step_.step().prompt_tiles), groups = static_cast<size_t>(heads / group);
  const shared::AttentionArgs args{heads, a.shape.kv_heads, D, a.scale, a.layer, kv.shape.blocks, splits};
  const std::initializer_list<Constant> constants = {{3, D}, {4, group}};
  const Place values = scratch(scratch_layout_.attention_values), stats = scratch(scratch_layout_.attention_stats);
  if (decode_tiles > 0)
    encode({is_f16(kv) ? "attention_decode_f16" : "attention_decode_f32", constants}, args,
           {step_.steps(), step_.query_tiles(), step_.block_tables(), place(a.q), place(kv.keys), place(kv.values), values, stats, place(a.out)},
           {{groups, decode_tiles, static_cast<size_t>(splits)}, shared::attention_decode_threads, static_cast<size_t>(shared::attention_decode_threadgroup_bytes(group, D))});
  if (decode_tiles > 0 && splits > 1)
    encode({"attention_combine"}, args, {step_.steps(), step_.query_tiles(), values, stats, place(a.out)}, {{static_cast<size_t>(heads), decode_tiles}, shared::attention_combine_threads});
  if (prompt_tiles > 0)
    encode({is_f16(kv) ? "attention_prompt_f16" : "attention_prompt_f32", constants}, args,
           {step_.steps(), step_.query_tiles(), step_.block_tables(), place(a.q), place(kv.keys), place(kv.values), place(a.out)}, {{groups, prompt_tiles}, shared::attention_prompt_threads});
}

void MetalBackend::route(const RouteArgs& a) {
  MetalRouting& r = static_cast<MetalRouting&>(a.out);
  r.rows = a.rows;
  const int E = r.experts;
  const shared::RouteArgs args{a.x.cols, E, a.top_k, static_cast<uint32_t>(a.router.tensor.row_bytes()), a.normalize};
  const bool one_dispatch = a.rows <= most_decode_rows, one_row = a.rows == 1;
  const std::string_view name = one_dispatch ? (one_row ? "route_and_group_r1" : "route_and_group_r4") : "route_r4";
  const RoutingLayout& at = r.layout;
  const Place ids = r.place(at.ids), start = r.place(at.start), pairs = r.place(at.pairs), tiles = r.place(at.tiles), tile_count = r.place(at.tile_count);
  const Place count = count_of(a.rows);
  const auto threadgroup_bytes = static_cast<size_t>(shared::route_threadgroup_bytes(E));
  encode({name, {{0, static_cast<int32_t>(a.router.tensor.type)}, {1, -1}, {2, -1}}}, args, {place(a.router), place(a.x), count, ids, r.place(at.weights), start, pairs, tiles, tile_count},
         {{one_dispatch ? 1 : groups_for(a.rows, shared::route_most_rows)}, shared::route_threads, threadgroup_bytes});
  if (!one_dispatch) encode({"route_group"}, args, {ids, count, start, pairs, tiles, tile_count}, {{1}, shared::route_threads, threadgroup_bytes});
}

void MetalBackend::gather_rows(const Activation& x, Activation& out) { gather(place(x), x.cols, place(out)); }

void MetalBackend::gather_rows(const Tensor& x, const Tensor& out) { gather(place(x), x.cols, place(out)); }

void MetalBackend::gather(const Place& x, int cols, const Place& out) {
  const shared::GatherRowsArgs args{cols};
  encode({"gather_rows"}, args, {x, step_.logit_rows(), step_.logit_count(), out},
         {{groups_for(cols, shared::gather_words_of_group), static_cast<size_t>(step_.step().logit_rows)}, shared::gather_threads});
}

void MetalBackend::copy_kv_blocks(Kv& given, std::span<const BlockCopy> copies) {
  if (copies.empty()) return;
  const MetalKv& kv = static_cast<const MetalKv&>(given);
  block_copies_.reserve(copies.size_bytes());
  std::memcpy(block_copies_.host<BlockCopy>(), copies.data(), copies.size_bytes());
  ++counters_.uploads;
  const shared::KvBlocksArgs args{kv.shape.blocks, static_cast<int32_t>(MetalKv::block_bytes(kv.shape) / 4)};
  encode({"copy_kv_blocks"}, args, {place(kv.keys), place(kv.values), block_copies_.place()}, {{copies.size(), static_cast<size_t>(kv.shape.layers)}, shared::kv_blocks_threads});
}

}  // namespace ferrum::metal
