#include <cmath>
#include <limits>
#include <utility>

#include "rows.h"

namespace ferrum::cpu {
namespace {

constexpr int sum_chunk = 8192;  // values of one task of a sum

struct Candidate {
  float logit;
  int32_t id;
  /// By falling logit, ties by rising id.
  bool operator<(const Candidate& other) const { return logit != other.logit ? logit > other.logit : id < other.id; }
};

float edited(float logit, const LogitEdit& edit) { return (logit > 0 ? logit / edit.penalty : logit * edit.penalty) + edit.bias; }

/// The `count` first in order. Ids whose logit is -inf or NaN come last, by rising id, and only where there is nothing else.
void select_largest(const Kernels& kernels, const float* row, int size, std::span<const int32_t> excluded, int count, Candidate* heap) {
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  std::fill_n(heap, count, Candidate{nothing, std::numeric_limits<int32_t>::max()});  // a heap with the worst on top
  int found = 0;
  for (int id = 0; (id = kernels.next_greater(row, id, size, heap[0].logit)) < size; ++id, ++found) {
    std::pop_heap(heap, heap + count);
    heap[count - 1] = {row[id], id};
    std::push_heap(heap, heap + count);
  }
  std::sort_heap(heap, heap + count);
  for (int id = 0; found < count; ++id)
    if (!(row[id] > nothing) && !std::binary_search(excluded.begin(), excluded.end(), id)) heap[found++] = {nothing, id};
}

}  // namespace

void CpuBackend::top_candidates(const TopCandidatesArgs& args) {
  const int V = args.logits.cols, rows = args.logits.rows;
  const float nothing = -std::numeric_limits<float>::infinity();
  std::vector<std::pair<float*, float>> originals;  // what the edits and exclusions overwrote
  originals.reserve(args.edits.size() + args.excluded.size() * static_cast<size_t>(rows));
  auto overwrite = [&](float* at, float value) { originals.emplace_back(at, std::exchange(*at, value)); };
  for (const LogitEdit& edit : args.edits) {
    float* at = row(args.logits, edit.row) + edit.token;
    overwrite(at, edited(*at, edit));
  }
  for (int r = 0; r < rows && !args.target_start.empty(); ++r)
    for (int32_t i = args.target_start[static_cast<size_t>(r)]; i < args.target_start[static_cast<size_t>(r) + 1]; ++i)
      args.target_logits[i] = row(args.logits, r)[args.targets[static_cast<size_t>(i)]];
  for (int r = 0; r < rows; ++r)
    for (int32_t id : args.excluded) overwrite(row(args.logits, r) + id, nothing);

  std::vector<Candidate> candidates(static_cast<size_t>(rows) * static_cast<size_t>(args.count));
  pool_.run(rows, [&](int r, int) {
    Candidate* mine = candidates.data() + static_cast<size_t>(r) * static_cast<size_t>(args.count);
    select_largest(kernels_, row(args.logits, r), V, args.excluded, args.count, mine);
    for (int i = 0; i < args.count; ++i) {
      args.ids[r * args.count + i] = mine[i].id;
      args.values[r * args.count + i] = mine[i].logit;
    }
  });

  const int chunks = (V + sum_chunk - 1) / sum_chunk;
  std::vector<double> sums(static_cast<size_t>(rows) * static_cast<size_t>(chunks) * 2);
  pool_.run(rows * chunks, [&](int task, int) {
    const int r = task / chunks, first = task % chunks * sum_chunk, size = std::min(sum_chunk, V - first);
    const float* x = row(args.logits, r) + first;
    const double shift = static_cast<double>(args.values[r * args.count]), scale = 1.0 / static_cast<double>(args.temperatures[static_cast<size_t>(r)]);
    sums[static_cast<size_t>(task) * 2] = kernels_.sum_exp(x, size, shift, 1.0);
    sums[static_cast<size_t>(task) * 2 + 1] = scale == 1.0 ? sums[static_cast<size_t>(task) * 2] : kernels_.sum_exp(x, size, shift, scale);
  });
  for (int r = 0; r < rows; ++r) {
    double plain = 0, scaled = 0;
    for (int c = 0; c < chunks; ++c) plain += sums[static_cast<size_t>(r * chunks + c) * 2], scaled += sums[static_cast<size_t>(r * chunks + c) * 2 + 1];
    const double largest = static_cast<double>(args.values[r * args.count]);
    if (args.values[r * args.count] == nothing) {  // nothing can be chosen: the sums above are of NaN
      args.log_sum_exp[r] = args.log_sum_exp_at_temperature[r] = largest;
      continue;
    }
    args.log_sum_exp[r] = largest + std::log(plain);
    args.log_sum_exp_at_temperature[r] = largest / static_cast<double>(args.temperatures[static_cast<size_t>(r)]) + std::log(scaled);
  }
  for (auto original = originals.rbegin(); original != originals.rend(); ++original) *original->first = original->second;
}

}  // namespace ferrum::cpu
