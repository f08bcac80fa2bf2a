#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "cpu_backend.h"

namespace ferrum::cpu {
namespace {

constexpr size_t most_measured = 512 << 20;  // far beyond any cache
constexpr size_t task_bytes = 1 << 20;       // small against the whole, so that a thread that is held up does not decide
constexpr double measured_seconds = 0.25;
constexpr int least_passes = 3;
constexpr int product_rows = 128, product_cols = 2048, product_columns = 128;  // of a task of products: some 500 KB
constexpr double product_seconds = 0.1;

using Words = uint64_t __attribute__((vector_size(16)));  // a vector register on every machine

/// Sum in eight chains of vectors, with the next page asked for; `bytes` is a multiple of 128.
uint64_t sum_words(const std::byte* data, size_t bytes) {
  Words sums[8] = {};
  for (size_t at = 0; at < bytes; at += sizeof(sums)) {
    for (size_t line = 0; line < sizeof(sums); line += 64) __builtin_prefetch(data + at + 4096 + line);
    const Words* words = reinterpret_cast<const Words*>(data + at);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  return sums[0][0] + sums[0][1];
}

}  // namespace

double CpuBackend::read_bandwidth(size_t most_bytes) {
  using Clock = std::chrono::steady_clock;
  const int tasks = static_cast<int>(std::clamp(most_bytes, task_bytes, most_measured) / task_bytes);
  CpuBuffer buffer(static_cast<size_t>(tasks) * task_bytes);
#if defined(__linux__)
  madvise(buffer.host(), buffer.bytes(), MADV_HUGEPAGE);  // as the model file is mapped, where it can be
#endif
  std::vector<uint64_t> sums(static_cast<size_t>(tasks));
  auto piece = [&](int task) { return buffer.host() + static_cast<size_t>(task) * task_bytes; };
  pool_.run(tasks, [&](int task, int) { std::memset(piece(task), 1, task_bytes); });  // untouched pages would all be the one zero page
  double best = 0;
  const Clock::time_point start = Clock::now();
  for (int pass = 0; pass < least_passes || std::chrono::duration<double>(Clock::now() - start).count() < measured_seconds; ++pass) {
    const Clock::time_point begin = Clock::now();
    pool_.run(tasks, [&](int task, int) { sums[static_cast<size_t>(task)] += sum_words(piece(task), task_bytes); });
    best = std::max(best, static_cast<double>(buffer.bytes()) / std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

double CpuBackend::product_rate() {
  using Clock = std::chrono::steady_clock;
  const size_t threads = static_cast<size_t>(pool_.threads()), scratch_bytes = kernels_.dot_scratch_bytes(product_cols);
  const int index = weight_type_index(static_cast<int>(WeightType::Q4_K));
  const size_t row_bytes = ferrum::row_bytes(WeightType::Q4_K, product_cols);
  CpuActivation activation(product_columns, product_cols, false, !options_.float_activations);
  std::vector<Column> columns;
  for (int c = 0; c < product_columns; ++c) {
    std::fill_n(activation.row(c), product_cols, 1.0f);
    activation.pack(kernels_, c);
    columns.push_back(activation.column(c));
  }
  CpuBuffer weights(threads * product_rows * row_bytes), scratch(threads * scratch_bytes), products(threads * product_columns * product_rows * sizeof(float));
  std::memset(weights.host(), 1, weights.bytes());  // untouched pages would all be the one zero page
  const int tasks = 16 * pool_.threads();
  double best = 0;
  const Clock::time_point start = Clock::now();
  for (int pass = 0; pass < least_passes || std::chrono::duration<double>(Clock::now() - start).count() < product_seconds; ++pass) {
    const Clock::time_point begin = Clock::now();
    pool_.run(tasks, [&](int, int thread) {
      const auto t = static_cast<size_t>(thread);
      float* out[product_columns];
      for (size_t c = 0; c < product_columns; ++c) out[c] = reinterpret_cast<float*>(products.host()) + (t * product_columns + c) * product_rows;
      (options_.float_activations ? kernels_.dot_float : kernels_.dot)[index]({.weights = weights.host() + t * product_rows * row_bytes, .row_bytes = row_bytes, .rows = product_rows,
          .k = product_cols, .columns = columns.data(), .column_count = product_columns, .out = out, .scratch = scratch.host() + t * scratch_bytes});
    });
    best = std::max(best, static_cast<double>(tasks) * product_rows * product_cols * product_columns / std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

}  // namespace ferrum::cpu
