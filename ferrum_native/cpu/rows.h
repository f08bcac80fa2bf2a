// Sharing out rows: the parallel loop of the ops whose rows are independent.
#pragma once
#include <algorithm>

#include "cpu_backend.h"

namespace ferrum::cpu {

template <class F> void CpuBackend::each_row(int rows, int cols, F&& f) {
  constexpr int64_t worth_sharing = 16384;  // values: some microseconds of work
  const int tasks = static_cast<int64_t>(rows) * cols < worth_sharing ? 1 : std::min(rows, 8 * pool_.threads());
  pool_.run(tasks, [&](int task, int) {
    const int first = static_cast<int>(static_cast<int64_t>(rows) * task / tasks), end = static_cast<int>(static_cast<int64_t>(rows) * (task + 1) / tasks);
    for (int i = first; i < end; ++i) f(i);
  });
}

}  // namespace ferrum::cpu
