#include "../core/kv_transfer.h"

#include <cstring>

#include "cpu_backend.h"

namespace ferrum::cpu {
namespace {

/// Where dimension d of a token's key lies in a block of a head.
int key_element(int place, int d) { return d * kv_block_tokens + place; }

/// Calls move(group in the blocks, place, where in it a dimension of this token lies, BlockQ8_0 of the array) for each.
template <class Move> void move_groups(const CpuKv& kv, std::span<const int32_t> blocks, int tokens, Move move) {
  const KvShape& s = kv.shape;
  size_t index = 0;
  for (int layer = 0; layer < s.layers; ++layer)
    for (const CpuBuffer* side : {&kv.keys, &kv.values})
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < s.heads; ++h) {
          auto* groups = reinterpret_cast<KvGroupQ8_0*>(side->host() + kv.offset(layer, blocks[static_cast<size_t>(t / kv_block_tokens)], h));
          for (int g = 0; g < s.head_dim / kv_group; ++g) move(groups[g], t % kv_block_tokens, side == &kv.keys ? KvGroupQ8_0::key_at : KvGroupQ8_0::value_at, index++);
        }
}

}  // namespace

void CpuBackend::read_kv(const Kv& given, std::span<const int32_t> blocks, int tokens, std::byte* out) {
  const CpuKv& kv = static_cast<const CpuKv&>(given);
  if (kv.shape.type != KvType::Q8_0) return read_kv_blocks(kv.shape, kv.keys.host(), kv.values.host(), blocks, tokens, out, key_element);
  move_groups(kv, blocks, tokens, [&](const KvGroupQ8_0& group, int place, auto at, size_t index) {
    BlockQ8_0 block;
    block.d = group.scale[place];
    for (int d = 0; d < kv_group; ++d) block.q[d] = group.q[at(place, d)];
    std::memcpy(out + index * sizeof block, &block, sizeof block);
  });
}

void CpuBackend::write_kv(Kv& given, std::span<const int32_t> blocks, int tokens, const std::byte* data) {
  CpuKv& kv = static_cast<CpuKv&>(given);
  if (kv.shape.type != KvType::Q8_0) return write_kv_blocks(kv.shape, kv.keys.host(), kv.values.host(), blocks, tokens, data, key_element);
  move_groups(kv, blocks, tokens, [&](KvGroupQ8_0& group, int place, auto at, size_t index) {
    BlockQ8_0 block;
    std::memcpy(&block, data + index * sizeof block, sizeof block);
    group.scale[place] = block.d;
    for (int d = 0; d < kv_group; ++d) group.q[at(place, d)] = block.q[d];
  });
}

}  // namespace ferrum::cpu
