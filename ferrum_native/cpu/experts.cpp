// The experts' products: every expert that has pairs multiplies its quantized rows with the columns of its pairs.
#include "rows.h"

namespace ferrum::cpu {

/// Rows of one task over `matrices` experts of `rows` rows each: as `rows_per_task`, within the room for the products of `columns` columns.
int CpuBackend::expert_rows_per_task(int rows, int matrices, int columns) const {
  const int room = std::max(expert_task_rows, product_floats_ / columns / 16 * 16);
  return std::min({rows, room, std::max(expert_task_rows, rows_per_task(rows * matrices))});
}

void CpuBackend::experts_gate_up(const ExpertsGateUpArgs& args) {
  const CpuRouting& routing = static_cast<const CpuRouting&>(args.routing);
  const CpuActivation& x = static_cast<const CpuActivation&>(args.x);
  CpuActivation& hidden = static_cast<CpuActivation&>(args.out);
  const CpuWeight &gate = static_cast<const CpuWeight&>(args.gate), &up = static_cast<const CpuWeight&>(args.up);
  const int F = hidden.cols, pairs = routing.rows * routing.top_k;
  for (int i = 0; i < pairs; ++i) columns_[i] = x.column(routing.pairs[i] / routing.top_k);

  const int block = expert_rows_per_task(F, routing.active_count, routing.rows), blocks = (F + block - 1) / block;
  pool_.run(routing.active_count * blocks, [&](int task, int thread) {
    const ThreadScratch& scratch = scratch_[static_cast<size_t>(thread)];
    const int expert = routing.active[task / blocks], first = task % blocks * block, rows = std::min(block, F - first);
    const int begin = routing.start[expert], count = routing.start[expert + 1] - begin;
    DotArgs dot{.weights = gate.row(expert, first), .row_bytes = gate.tensor.row_bytes(), .rows = rows, .k = x.cols,
                .columns = columns_ + begin, .column_count = count, .out = scratch.out, .scratch = scratch.dot};
    for (int i = 0; i < count; ++i) scratch.out[i] = hidden.row(routing.pairs[begin + i]) + first;
    gate.dot(dot);
    for (int i = 0; i < count; ++i) scratch.out[i] = scratch.products + i * block;
    dot.weights = up.row(expert, first);
    dot.row_bytes = up.tensor.row_bytes();
    up.dot(dot);
    for (int i = 0; i < count; ++i) kernels_.silu_product(hidden.row(routing.pairs[begin + i]) + first, scratch.products + i * block, rows);
  });
  pack_rows(hidden, pairs);
}

void CpuBackend::experts_down(const ExpertsDownArgs& args) {
  const CpuRouting& routing = static_cast<const CpuRouting&>(args.routing);
  const CpuActivation& x = static_cast<const CpuActivation&>(args.x);
  const CpuWeight& down = static_cast<const CpuWeight&>(args.down);
  const int H = args.out.cols, K = routing.top_k, pairs = routing.rows * K;
  for (int i = 0; i < pairs; ++i) columns_[i] = x.column(routing.pairs[i]);

  // A task computes some rows of all experts, so that the products of a token meet in one thread and are added in the order of k.
  const int block = std::min(rows_per_task(H), std::max(expert_task_rows, product_floats_ / pairs / 16 * 16)), tasks = (H + block - 1) / block;
  pool_.run(tasks, [&](int task, int thread) {
    const ThreadScratch& scratch = scratch_[static_cast<size_t>(thread)];
    const int first = task * block, rows = std::min(block, H - first);
    for (int a = 0; a < routing.active_count; ++a) {
      const int expert = routing.active[a], begin = routing.start[expert], count = routing.start[expert + 1] - begin;
      for (int i = 0; i < count; ++i) scratch.out[i] = scratch.products + static_cast<size_t>(routing.pairs[begin + i]) * static_cast<size_t>(block);
      down.dot({.weights = down.row(expert, first), .row_bytes = down.tensor.row_bytes(), .rows = rows, .k = x.cols,
                .columns = columns_ + begin, .column_count = count, .out = scratch.out, .scratch = scratch.dot});
    }
    for (int t = 0; t < routing.rows; ++t)
      kernels_.weighted_sum(scratch.products + static_cast<size_t>(t) * static_cast<size_t>(K) * static_cast<size_t>(block), block, routing.weights + t * K, K, rows, row(args.out, t) + first);
  });
}

}  // namespace ferrum::cpu
