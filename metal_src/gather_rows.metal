// gather_rows: a threadgroup copies a stretch of one row, a thread every 256th word of it.
#include <metal_stdlib>
#include "shared/gather_rows.h"

using namespace metal;
using namespace ferrum::shared;

kernel void gather_rows(constant GatherRowsArgs& args [[buffer(0)]],
                        device const uint* x [[buffer(1)]],
                        device const int32_t* rows [[buffer(2)]],
                        device const int32_t* count [[buffer(3)]],
                        device uint* out [[buffer(4)]],
                        uint3 group [[threadgroup_position_in_grid]],
                        ushort thread_index [[thread_index_in_threadgroup]]) {
  if (int(group.y) >= count[0]) return;
  device const uint* from = x + ulong(rows[group.y]) * ulong(args.words);
  device uint* to = out + ulong(group.y) * ulong(args.words);
  const int begin = int(group.x) * gather_words_of_group, end = min(begin + int(gather_words_of_group), args.words);
  for (int i = begin + thread_index; i < end; i += gather_threads) to[i] = from[i];
}
