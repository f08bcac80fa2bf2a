// copy_kv_blocks, poison_kv_blocks: a threadgroup takes the keys and values of one block of one layer, a thread every 256th 16 bytes of them.
#include <metal_stdlib>
#include "shared/kv_blocks.h"

using namespace metal;
using namespace ferrum::shared;

/// First 16 bytes of a block of a layer.
inline ulong block_begin(constant KvBlocksArgs& args, uint layer, int block) { return (ulong(layer) * ulong(args.blocks) + ulong(block)) * ulong(args.words / 4); }

kernel void copy_kv_blocks(constant KvBlocksArgs& args [[buffer(0)]],
                           device uint4* keys [[buffer(1)]],
                           device uint4* values [[buffer(2)]],
                           device const int32_t* copies [[buffer(3)]],
                           uint3 group [[threadgroup_position_in_grid]],
                           ushort thread_index [[thread_index_in_threadgroup]]) {
  const ulong from = block_begin(args, group.y, copies[2 * group.x]), to = block_begin(args, group.y, copies[2 * group.x + 1]);
  for (int i = thread_index; i < args.words / 4; i += kv_blocks_threads) {
    keys[to + i] = keys[from + i];
    values[to + i] = values[from + i];
  }
}

kernel void poison_kv_blocks(constant KvBlocksArgs& args [[buffer(0)]],
                             device uint4* keys [[buffer(1)]],
                             device uint4* values [[buffer(2)]],
                             device const int32_t* blocks [[buffer(3)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort thread_index [[thread_index_in_threadgroup]]) {
  const ulong at = block_begin(args, group.y, blocks[group.x]);
  for (int i = thread_index; i < args.words / 4; i += kv_blocks_threads) keys[at + i] = values[at + i] = uint4(0xffffffffu);
}
