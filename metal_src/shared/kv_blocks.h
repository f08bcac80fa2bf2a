// copy_kv_blocks, poison_kv_blocks: whole blocks of every layer and head. `words` are the 4-byte words of one block of all heads of one layer, a
// multiple of 4.
//
// kernel            buffers after args                                                                  grid (threadgroups)   threads
// copy_kv_blocks    keys; values; copies int32 [n, 2] of {from, to}, no block is both                   (n, layers)           kv_blocks_threads
// poison_kv_blocks  keys; values; blocks int32 [n]: every byte 0xff, which is NaN in f16 and in f32     (n, layers)           kv_blocks_threads
#pragma once
#include "integers.h"

namespace ferrum {
namespace shared {

enum { kv_blocks_threads = 256 };

struct KvBlocksArgs { int32_t blocks, words; };  // blocks of a layer
static_assert(sizeof(KvBlocksArgs) == 8, "KvBlocksArgs is packed");

}  // namespace shared
}  // namespace ferrum
