// linear_gemv_cN: a simdgroup computes gemv_rows rows of one weight for N rows of activations, a threadgroup gemv_block rows.
// linear_gemm: a threadgroup computes a tile of gemm_rows rows of one weight for gemm_columns rows of activations.
// The rows of the weights are laid end to end in blocks; no block holds rows of two weights. Assumed: rows of quantized types of whole blocks.
#include "gemm.h"
#include "gemv.h"
#include "shared/linear.h"

using namespace ferrum;
using namespace ferrum::shared;

struct LinearPart {
  int weight;      // 0, 1, 2
  int first_row;   // of the block, in the weight
  int out_column;  // of the weight's first row
};

inline LinearPart part_of(int block, int block_rows, constant LinearArgs& args) {
  LinearPart part;
  part.weight = 0;
  part.out_column = 0;
  while (part.weight < 2) {
    const int rows = args.rows[part.weight], blocks = (rows + block_rows - 1) / block_rows;
    if (block < blocks) break;
    block -= blocks;
    part.out_column += rows;
    ++part.weight;
  }
  part.first_row = block * block_rows;
  return part;
}
inline int weight_type(int weight) { return weight == 0 ? weight_type_0 : weight == 1 ? weight_type_1 : weight_type_2; }
inline ulong out_cols(constant LinearArgs& args) { return ulong(args.rows[0] + args.rows[1] + args.rows[2]); }

template <int columns>
kernel void linear_gemv(constant LinearArgs& args [[buffer(0)]],
                        device const uint8_t* weight_0 [[buffer(1)]],
                        device const uint8_t* weight_1 [[buffer(2)]],
                        device const uint8_t* weight_2 [[buffer(3)]],
                        device const float* x [[buffer(4)]],
                        device const int32_t* count [[buffer(5)]],
                        device float* out [[buffer(6)]],
                        uint3 group [[threadgroup_position_in_grid]],
                        ushort lane [[thread_index_in_simdgroup]],
                        ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const LinearPart part = part_of(int(group.x), gemv_block, args);
  const int rows = args.rows[part.weight], first_row = part.first_row + gemv_rows * simdgroup_index;
  const int first_column = int(group.y) * columns, columns_here = min(columns, count[0] - first_column);
  if (first_row >= rows || columns_here <= 0) return;
  Products<gemv_rows, columns> products;
  set_rows(products, part.weight == 0 ? weight_0 : part.weight == 1 ? weight_1 : weight_2, args.row_bytes[part.weight], first_row, rows);
  for (int c = 0; c < columns; ++c) products.x[c] = x + ulong(first_column + min(c, columns_here - 1)) * ulong(args.cols);
  multiply(weight_type(part.weight), products, args.cols, lane);
  if (lane != 0) return;
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < gemv_rows; ++r)
      if (c < columns_here && first_row + r < rows) out[ulong(first_column + c) * out_cols(args) + ulong(part.out_column + first_row + r)] = products.sum[r][c];
}
template [[host_name("linear_gemv_c1")]] kernel decltype(linear_gemv<1>) linear_gemv<1>;
template [[host_name("linear_gemv_c2")]] kernel decltype(linear_gemv<2>) linear_gemv<2>;
template [[host_name("linear_gemv_c4")]] kernel decltype(linear_gemv<4>) linear_gemv<4>;
template [[host_name("linear_gemv_c8")]] kernel decltype(linear_gemv<8>) linear_gemv<8>;

kernel void linear_gemm(constant LinearArgs& args [[buffer(0)]],
                        device const uint8_t* weight_0 [[buffer(1)]],
                        device const uint8_t* weight_1 [[buffer(2)]],
                        device const uint8_t* weight_2 [[buffer(3)]],
                        device const float* x [[buffer(4)]],
                        device const int32_t* count [[buffer(5)]],
                        device float* out [[buffer(6)]],
                        threadgroup float* memory [[threadgroup(0)]],
                        uint3 group [[threadgroup_position_in_grid]],
                        ushort thread_index [[thread_index_in_threadgroup]],
                        ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const LinearPart part = part_of(int(group.x), gemm_rows, args);
  const int rows = args.rows[part.weight];
  const int first_column = int(group.y) * gemm_columns, columns_here = min(int(gemm_columns), count[0] - first_column);
  if (part.first_row >= rows || columns_here <= 0) return;  // the whole threadgroup
  const TileThread self = {thread_index, simdgroup_index};
  device const float* x_row = x + ulong(first_column + min(thread_index / 4, columns_here - 1)) * ulong(args.cols);
  device const uint8_t* matrix = part.weight == 0 ? weight_0 : part.weight == 1 ? weight_1 : weight_2;
  TileSums sums;
  clear(sums);
  multiply_tile(weight_type(part.weight), tile_of(matrix, args.row_bytes[part.weight], part.first_row, rows, args.cols, x_row), self, memory, sums);
  share_sums(sums, self, memory);
  for (uint i = thread_index; i < gemm_rows * gemm_columns; i += gemm_threads) {
    const int r = int(i % gemm_rows), c = int(i / gemm_rows);
    if (c < columns_here && part.first_row + r < rows)
      out[ulong(first_column + c) * out_cols(args) + ulong(part.out_column + part.first_row + r)] = memory[c * tile_sums_stride + r];
  }
}
