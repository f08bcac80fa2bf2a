// experts_gate_up_gemv_cN: a simdgroup computes gemv_rows rows of an expert for up to N of its pairs, which start at the grid's y in `pairs`.
// experts_gate_up_gemm: a threadgroup computes 32 rows of gate and the same 32 of up for one tile of pairs.
// Both end with silu(gate) * up; the products of gate and up meet in one simdgroup or threadgroup. Assumed: what `route` writes.
#include "gemm.h"
#include "gemv.h"
#include "rows.h"
#include "shared/experts_gate_up.h"

using namespace ferrum;
using namespace ferrum::shared;

/// x / (1 + exp(-x)), without the exponential of a positive number.
inline float silu(float x) {
  const float e = exp_below_zero(-fabs(x));
  return (x < 0.f ? x * e : x) / (1.f + e);
}

/// The simdgroup's rows for pairs[0 .. count - 1] of one expert, count <= columns.
template <int columns>
inline void gate_up_rows(constant ExpertsGateUpArgs& args, device const uint8_t* gate, device const uint8_t* up, device const float* x,
                         device const int32_t* pairs, int count, int first_row, ushort lane, device float* out) {
  Products<gemv_rows, columns> gates, ups;
  set_rows(gates, gate, args.gate_row_bytes, first_row, args.rows);
  set_rows(ups, up, args.up_row_bytes, first_row, args.rows);
  for (int c = 0; c < columns; ++c) gates.x[c] = ups.x[c] = x + ulong(pairs[min(c, count - 1)] / args.top_k) * ulong(args.cols);
  multiply(weight_type_0, gates, args.cols, lane);
  multiply(weight_type_1, ups, args.cols, lane);
  if (lane != 0) return;
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < gemv_rows; ++r)
      if (c < count && first_row + r < args.rows) out[ulong(pairs[c]) * ulong(args.rows) + ulong(first_row + r)] = silu(gates.sum[r][c]) * ups.sum[r][c];
}

template <int most>
kernel void experts_gate_up_gemv(constant ExpertsGateUpArgs& args [[buffer(0)]],
                                 device const uint8_t* gate [[buffer(1)]],
                                 device const uint8_t* up [[buffer(2)]],
                                 device const float* x [[buffer(3)]],
                                 device const int32_t* ids [[buffer(4)]],
                                 device const int32_t* start [[buffer(5)]],
                                 device const int32_t* pairs [[buffer(6)]],
                                 device const int32_t* count [[buffer(7)]],
                                 device float* out [[buffer(8)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 ushort lane [[thread_index_in_simdgroup]],
                                 ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const int position = int(group.y), first_row = int(group.x) * gemv_block + gemv_rows * simdgroup_index;
  if (position >= count[0] * args.top_k || first_row >= args.rows) return;
  const ExpertRun run = run_at(position, most, ids, start, pairs);
  device const uint8_t* expert_gate = gate + ulong(run.expert) * ulong(args.rows) * args.gate_row_bytes;
  device const uint8_t* expert_up = up + ulong(run.expert) * ulong(args.rows) * args.up_row_bytes;
  pairs += position;
  if (run.count == 1) gate_up_rows<1>(args, expert_gate, expert_up, x, pairs, run.count, first_row, lane, out);
  else if (most > 1 && run.count > 1) gate_up_rows<most>(args, expert_gate, expert_up, x, pairs, run.count, first_row, lane, out);
}
template [[host_name("experts_gate_up_gemv_c1")]] kernel decltype(experts_gate_up_gemv<1>) experts_gate_up_gemv<1>;
template [[host_name("experts_gate_up_gemv_c4")]] kernel decltype(experts_gate_up_gemv<4>) experts_gate_up_gemv<4>;

kernel void experts_gate_up_gemm(constant ExpertsGateUpArgs& args [[buffer(0)]],
                                 device const uint8_t* gate [[buffer(1)]],
                                 device const uint8_t* up [[buffer(2)]],
                                 device const float* x [[buffer(3)]],
                                 device const int32_t* start [[buffer(4)]],
                                 device const int32_t* pairs [[buffer(5)]],
                                 device const int32_t* tiles [[buffer(6)]],
                                 device const int32_t* tile_count [[buffer(7)]],
                                 device float* out [[buffer(8)]],
                                 threadgroup float* memory [[threadgroup(0)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 ushort thread_index [[thread_index_in_threadgroup]],
                                 ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  if (int(group.y) >= tile_count[0]) return;  // the whole threadgroup
  const int expert = tiles[2 * group.y], first = tiles[2 * group.y + 1], columns_here = min(int(expert_tile_pairs), start[expert + 1] - first);
  const int first_row = int(group.x) * 32, rows = args.rows - first_row;
  const TileThread self = {thread_index, simdgroup_index};
  pairs += first;

  TileInput input;
  input.cols = args.cols;
  input.x = x + ulong(pairs[min(thread_index / 4, columns_here - 1)] / args.top_k) * ulong(args.cols);
  input.row_bytes = args.gate_row_bytes;
  input.half_0.first = gate + ulong(expert * args.rows + first_row) * args.gate_row_bytes;
  input.half_0.rows = rows;
  input.half_1.first = up + ulong(expert * args.rows + first_row) * args.up_row_bytes;
  input.half_1.rows = rows;
  TileSums sums;
  clear(sums);
  if (weight_type_0 == weight_type_1) {
    multiply_tile(weight_type_0, input, self, memory, sums);
  } else {  // formats order the columns of a step differently: one after the other, with zeros in the other's half
    input.half_1.rows = 0;
    multiply_tile(weight_type_0, input, self, memory, sums);
    input.row_bytes = args.up_row_bytes;
    input.half_0.rows = 0;
    input.half_1.rows = rows;
    multiply_tile(weight_type_1, input, self, memory, sums);
  }
  share_sums(sums, self, memory);
  for (uint i = thread_index; i < 32 * gemm_columns; i += gemm_threads) {
    const int r = int(i % 32), c = int(i / 32);
    threadgroup const float* column = memory + c * tile_sums_stride;
    if (c < columns_here && r < rows) out[ulong(pairs[c]) * ulong(args.rows) + ulong(first_row + r)] = silu(column[r]) * column[32 + r];
  }
}
