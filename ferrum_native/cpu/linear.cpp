#include "rows.h"

namespace ferrum::cpu {

/// Blocks of weight rows: long enough to stream from memory, short enough that all threads end together.
int CpuBackend::rows_per_task(int rows) const {
  const int even = rows / (8 * pool_.threads()) / 16 * 16;
  return std::clamp(even, 16, 256);
}

void CpuBackend::linear(const LinearArgs& args) {
  const CpuActivation& x = static_cast<const CpuActivation&>(args.x);
  for (int i = 0; i < args.rows; ++i) columns_[i] = x.column(i);
  int total_rows = 0;
  for (const Weight* weight : args.weights) total_rows += weight->tensor.rows;
  const int block = rows_per_task(total_rows);
  int tasks = 0;
  for (const Weight* weight : args.weights) tasks += (weight->tensor.rows + block - 1) / block;

  pool_.run(tasks, [&](int task, int thread) {
    int column = 0;  // where the weight's outputs start in a row of `out`
    for (const Weight* w : args.weights) {
      const CpuWeight& weight = static_cast<const CpuWeight&>(*w);
      const int blocks = (weight.tensor.rows + block - 1) / block;
      if (task < blocks) {
        const int first = task * block;
        float** out = scratch_[static_cast<size_t>(thread)].out;
        for (int i = 0; i < args.rows; ++i) out[i] = row(args.out, i) + column + first;
        weight.dot({.weights = weight.row(0, first), .row_bytes = weight.tensor.row_bytes(), .rows = std::min(block, weight.tensor.rows - first), .k = weight.tensor.cols,
                    .columns = columns_, .column_count = args.rows, .out = out, .scratch = scratch_[static_cast<size_t>(thread)].dot});
        return;
      }
      task -= blocks;
      column += weight.tensor.rows;
    }
  });
}

}  // namespace ferrum::cpu
