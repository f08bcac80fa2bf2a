// The experts' products: every expert that has pairs multiplies its quantized rows with the columns of its pairs.
#include <utility>

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

  // Some rows of an expert times all of its pairs, pairs[begin] .. pairs[begin + count - 1], whose products lie `stride` apart.
  auto multiply = [&](int active, int first, int rows, float* products, int stride, const ThreadScratch& scratch) {
    const int expert = routing.active[active], begin = routing.start[expert], count = routing.start[expert + 1] - begin;
    for (int i = 0; i < count; ++i) scratch.out[i] = products + static_cast<size_t>(i) * static_cast<size_t>(stride);
    down.dot({.weights = down.row(expert, first), .row_bytes = down.tensor.row_bytes(), .rows = rows, .k = x.cols,
              .columns = columns_ + begin, .column_count = count, .out = scratch.out, .scratch = scratch.dot});
    return std::pair(begin, count);
  };
  // A token's products are added in the order of experts.
  auto clear = [&](int first, int rows) {
    for (int t = 0; t < routing.rows; ++t) std::fill_n(row(args.out, t) + first, rows, 0.0f);
  };
  auto add = [&](int begin, int count, int first, int rows, const float* products, int stride) {
    for (int i = 0; i < count; ++i) {
      const int pair = routing.pairs[begin + i];
      kernels_.add_weighted(products + static_cast<size_t>(i) * static_cast<size_t>(stride), routing.weights[pair], rows, row(args.out, pair / K) + first);
    }
  };
  if (routing.rows <= most_tokens_of_shared_products) {  // each expert's weights are read in the order of addresses
    const int block = expert_rows_per_task(H, routing.active_count, 1), blocks = (H + block - 1) / block;
    pool_.run(routing.active_count * blocks, [&](int task, int thread) {
      const int active = task / blocks, first = task % blocks * block;
      float* products = shared_products_ + static_cast<size_t>(routing.start[routing.active[active]]) * static_cast<size_t>(H) + first;
      multiply(active, first, std::min(block, H - first), products, H, scratch_[static_cast<size_t>(thread)]);
    });
    const int parts = routing.rows == 1 ? 1 : pool_.threads();
    pool_.run(parts, [&](int part, int) {
      const int first = H * part / parts, rows = H * (part + 1) / parts - first;
      clear(first, rows);
      add(0, pairs, first, rows, shared_products_ + first, H);
    });
    return;
  }
  // A task computes some rows of all experts, so that products are added while they are in the cache. It reads all activations: blocks are
  // twice as long as those of other ops.
  const int block = expert_rows_per_task(H, 2, routing.rows), tasks = (H + block - 1) / block;
  pool_.run(tasks, [&](int task, int thread) {
    const ThreadScratch& scratch = scratch_[static_cast<size_t>(thread)];
    const int first = task * block, rows = std::min(block, H - first);
    clear(first, rows);
    for (int active = 0; active < routing.active_count; ++active) {
      const auto [begin, count] = multiply(active, first, rows, scratch.products, block, scratch);
      add(begin, count, first, rows, scratch.products, block);
    }
  });
}

}  // namespace ferrum::cpu
