// A threadgroup writes a stretch of one token's row of the table; a thread one unit of the table's format.
// Assumed: ids inside the table; rows of quantized types of whole blocks.
#include "weights.h"
#include "shared/embed.h"

using namespace ferrum;
using namespace ferrum::shared;

template <typename Format>
inline void copy_unit(device const uint8_t* row, device float* out, uint unit, int cols) {
  if (unit >= Format::units(cols)) return;
  float4 w[Format::quads];
  Format::load(row, unit, cols, w);
  for (uint quad = 0; quad < Format::quads; ++quad) store_quad<Format>(out, Format::at(unit, quad), cols, w[quad]);
}

kernel void embed(constant EmbedArgs& args [[buffer(0)]],
                  device const uint8_t* table [[buffer(1)]],
                  device const int32_t* ids [[buffer(2)]],
                  device const int32_t* count [[buffer(3)]],
                  device float* out [[buffer(4)]],
                  uint3 group [[threadgroup_position_in_grid]],
                  ushort thread_index [[thread_index_in_threadgroup]]) {
  const int token = int(group.y);
  if (token >= count[0]) return;
  device const uint8_t* row = table + ulong(ids[token]) * args.row_bytes;
  device float* out_row = out + ulong(token) * ulong(args.cols);
  const uint unit = group.x * embed_threads + thread_index;
  FERRUM_WITH_FORMAT(weight_type_0, args.cols, copy_unit<Format>(row, out_row, unit, args.cols))
}
