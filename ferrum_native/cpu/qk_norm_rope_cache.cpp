#include <cstring>

#include "rows.h"

namespace ferrum::cpu {
namespace {

const float* norm_weight(const Weight* weight) { return weight ? reinterpret_cast<const float*>(weight->tensor.data) : nullptr; }

}  // namespace

void CpuBackend::qk_norm_rope_cache(const QkNormRopeCacheArgs& args) {
  CpuKv& kv = static_cast<CpuKv&>(args.kv);
  const HeadShape& s = args.shape;
  const int D = s.head_dim;
  const KvType type = kv.shape.type;
  each_row(batch_->tokens, args.qkv.cols, [&](int t) {
    const float* qkv = row(args.qkv, t);
    const float* rope = batch_->rope_cos_sin.data() + static_cast<size_t>(t) * static_cast<size_t>(args.rotary_dim);
    const int slot = batch_->kv_slots[static_cast<size_t>(t)], block = slot / kv_block_tokens, place = slot % kv_block_tokens;
    QkNormRopeArgs head{.in = qkv, .weight = norm_weight(args.q_norm), .cos_sin = rope, .head_dim = D, .rotary_dim = args.rotary_dim, .eps = args.eps, .out = row(args.q_out, t)};
    for (int h = 0; h < s.heads; ++h, head.in += D, head.out += D) kernels_.qk_norm_rope(head);
    float key[max_head_dim];
    head.weight = norm_weight(args.k_norm);
    head.out = key;
    for (int h = 0; h < s.kv_heads; ++h, head.in += D) {
      kernels_.qk_norm_rope(head);
      kernels_.write_key(key, D, type, place, kv.keys.host() + kv.offset(args.layer, block, h));
      kernels_.write_value(head.in + s.kv_heads * D, D, type, place, kv.values.host() + kv.offset(args.layer, block, h));
    }
  });
}

}  // namespace ferrum::cpu
