// experts_down_gemv_cN: a threadgroup computes experts_down_rows rows of all tokens: its simdgroups share the pairs, whose products meet in
// threadgroup memory and are added in the order of k. So an expert's rows are read once for N of its pairs.
// experts_down_gemm: a threadgroup computes gemm_rows rows for one tile of pairs; experts_down_sum then adds the products of a token.
// Assumed: what `route` writes; for the gemv at most experts_down_most_pairs pairs.
#include "gemm.h"
#include "gemv.h"
#include "shared/experts_down.h"

using namespace ferrum;
using namespace ferrum::shared;

/// The products of the threadgroup's rows with pairs[0 .. count - 1] of one expert, count <= columns, to out[pair * experts_down_rows + row].
template <int columns>
inline void down_rows(constant ExpertsDownArgs& args, device const uint8_t* down, device const float* x, device const int32_t* pairs, int count,
                      int first_row, ushort lane, threadgroup float* out) {
  Products<experts_down_rows, columns> products;
  set_rows(products, down, args.row_bytes, first_row, args.rows);
  for (int c = 0; c < columns; ++c) products.x[c] = x + ulong(pairs[min(c, count - 1)]) * ulong(args.cols);
  multiply(weight_type_0, products, args.cols, lane);
  if (lane != 0) return;
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < experts_down_rows; ++r)
      if (c < count) out[pairs[c] * experts_down_rows + r] = products.sum[r][c];
}

template <int most>
kernel void experts_down_gemv(constant ExpertsDownArgs& args [[buffer(0)]],
                              device const uint8_t* down [[buffer(1)]],
                              device const float* x [[buffer(2)]],
                              device const int32_t* ids [[buffer(3)]],
                              device const float* weights [[buffer(4)]],
                              device const int32_t* start [[buffer(5)]],
                              device const int32_t* pairs [[buffer(6)]],
                              device const int32_t* count [[buffer(7)]],
                              device float* out [[buffer(8)]],
                              threadgroup float* products [[threadgroup(0)]],
                              uint3 group [[threadgroup_position_in_grid]],
                              ushort thread_index [[thread_index_in_threadgroup]],
                              ushort lane [[thread_index_in_simdgroup]],
                              ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const int first_row = int(group.x) * experts_down_rows, tokens = count[0];
  for (int position = simdgroup_index; position < tokens * args.top_k; position += gemv_simdgroups) {
    const ExpertRun run = run_at(position, most, ids, start, pairs);
    device const uint8_t* matrix = down + ulong(run.expert) * ulong(args.rows) * args.row_bytes;
    if (run.count == 1) down_rows<1>(args, matrix, x, pairs + position, run.count, first_row, lane, products);
    else if (most > 1 && run.count > 1) down_rows<most>(args, matrix, x, pairs + position, run.count, first_row, lane, products);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < tokens * experts_down_rows; i += gemv_threads) {
    const int token = i / experts_down_rows, r = i % experts_down_rows;
    float sum = 0.f;
    for (int k = 0; k < args.top_k; ++k) sum += weights[token * args.top_k + k] * products[(token * args.top_k + k) * experts_down_rows + r];
    if (first_row + r < args.rows) out[ulong(token) * ulong(args.rows) + ulong(first_row + r)] = sum;
  }
}
template [[host_name("experts_down_gemv_c1")]] kernel decltype(experts_down_gemv<1>) experts_down_gemv<1>;
template [[host_name("experts_down_gemv_c4")]] kernel decltype(experts_down_gemv<4>) experts_down_gemv<4>;

kernel void experts_down_gemm(constant ExpertsDownArgs& args [[buffer(0)]],
                              device const uint8_t* down [[buffer(1)]],
                              device const float* x [[buffer(2)]],
                              device const int32_t* start [[buffer(3)]],
                              device const int32_t* pairs [[buffer(4)]],
                              device const int32_t* tiles [[buffer(5)]],
                              device const int32_t* tile_count [[buffer(6)]],
                              device float* products [[buffer(7)]],
                              threadgroup float* memory [[threadgroup(0)]],
                              uint3 group [[threadgroup_position_in_grid]],
                              ushort thread_index [[thread_index_in_threadgroup]],
                              ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  if (int(group.y) >= tile_count[0]) return;  // the whole threadgroup
  const int expert = tiles[2 * group.y], first = tiles[2 * group.y + 1], columns_here = min(int(expert_tile_pairs), start[expert + 1] - first);
  const int first_row = int(group.x) * gemm_rows;
  const TileThread self = {thread_index, simdgroup_index};
  pairs += first;
  device const float* x_row = x + ulong(pairs[min(thread_index / 4, columns_here - 1)]) * ulong(args.cols);
  device const uint8_t* matrix = down + ulong(expert) * ulong(args.rows) * args.row_bytes;
  TileSums sums;
  clear(sums);
  multiply_tile(weight_type_0, tile_of(matrix, args.row_bytes, first_row, args.rows, args.cols, x_row), self, memory, sums);
  share_sums(sums, self, memory);
  for (uint i = thread_index; i < gemm_rows * gemm_columns; i += gemm_threads) {
    const int r = int(i % gemm_rows), c = int(i / gemm_rows);
    if (c < columns_here && first_row + r < args.rows) products[ulong(pairs[c]) * ulong(args.rows) + ulong(first_row + r)] = memory[c * tile_sums_stride + r];
  }
}

kernel void experts_down_sum(constant ExpertsDownArgs& args [[buffer(0)]],
                             device const float* products [[buffer(1)]],
                             device const float* weights [[buffer(2)]],
                             device const int32_t* count [[buffer(3)]],
                             device float* out [[buffer(4)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort thread_index [[thread_index_in_threadgroup]]) {
  const int token = int(group.y), row = int(group.x) * experts_down_sum_threads + thread_index;
  if (token >= count[0] || row >= args.rows) return;
  float sum = 0.f;
  for (int k = 0; k < args.top_k; ++k) {
    const int pair = token * args.top_k + k;
    sum += weights[pair] * products[ulong(pair) * ulong(args.rows) + ulong(row)];
  }
  out[ulong(token) * ulong(args.rows) + ulong(row)] = sum;
}
