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

/// Logits that are changed for the time of a call, and come back as they were on every way out.
class Overwritten {
 public:
  explicit Overwritten(size_t most) { originals_.reserve(most); }
  ~Overwritten() {
    for (auto original = originals_.rbegin(); original != originals_.rend(); ++original) *original->first = original->second;
  }
  Overwritten(const Overwritten&) = delete;
  Overwritten& operator=(const Overwritten&) = delete;
  void set(float* at, float value) { originals_.emplace_back(at, std::exchange(*at, value)); }

 private:
  std::vector<std::pair<float*, float>> originals_;
};

}  // namespace

void CpuBackend::top_candidates(const TopCandidatesArgs& args) {
  const int V = args.logits.cols, rows = args.logits.rows, chunks = (V + sum_chunk - 1) / sum_chunk;
  const auto count = static_cast<size_t>(args.count);
  const float nothing = -std::numeric_limits<float>::infinity();
  std::vector<Candidate> candidates(static_cast<size_t>(rows) * count);
  std::vector<double> sums(static_cast<size_t>(rows) * static_cast<size_t>(chunks) * 2);
  Overwritten overwritten(args.edits.size() + args.excluded.size() * static_cast<size_t>(rows));

  for (const LogitEdit& edit : args.edits) {
    float* at = row(args.logits, edit.row) + edit.token;
    overwritten.set(at, edited(*at, edit));
  }
  for (int r = 0; r < rows && !args.target_start.empty(); ++r)
    for (int32_t i = args.target_start[static_cast<size_t>(r)]; i < args.target_start[static_cast<size_t>(r) + 1]; ++i)
      args.target_logits[i] = row(args.logits, r)[args.targets[static_cast<size_t>(i)]];
  for (int r = 0; r < rows; ++r)
    for (int32_t id : args.excluded) overwritten.set(row(args.logits, r) + id, nothing);

  pool_.run(rows, [&](int r, int) {
    const size_t first = static_cast<size_t>(r) * count;
    select_largest(kernels_, row(args.logits, r), V, args.excluded, args.count, candidates.data() + first);
    for (size_t i = first; i < first + count; ++i) {
      args.ids[i] = candidates[i].id;
      args.values[i] = candidates[i].logit;
    }
  });

  auto largest_of = [&](int r) { return static_cast<double>(args.values[static_cast<size_t>(r) * count]); };
  pool_.run(rows * chunks, [&](int task, int) {
    const int r = task / chunks, first = task % chunks * sum_chunk, size = std::min(sum_chunk, V - first);
    const float* x = row(args.logits, r) + first;
    const double scale = 1.0 / static_cast<double>(args.temperatures[static_cast<size_t>(r)]);
    double* sum = sums.data() + static_cast<size_t>(task) * 2;
    sum[0] = kernels_.sum_exp(x, size, largest_of(r), 1.0);
    sum[1] = scale == 1.0 ? sum[0] : kernels_.sum_exp(x, size, largest_of(r), scale);
  });
  for (int r = 0; r < rows; ++r) {
    const double largest = largest_of(r), temperature = static_cast<double>(args.temperatures[static_cast<size_t>(r)]);
    double plain = 0, scaled = 0;
    for (size_t c = static_cast<size_t>(r) * static_cast<size_t>(chunks); c < static_cast<size_t>(r + 1) * static_cast<size_t>(chunks); ++c) plain += sums[2 * c], scaled += sums[2 * c + 1];
    // Where nothing can be chosen the sums are of NaN.
    const bool none = args.values[static_cast<size_t>(r) * count] == nothing;
    args.log_sum_exp[r] = none ? largest : largest + std::log(plain);
    args.log_sum_exp_at_temperature[r] = none ? largest : largest / temperature + std::log(scaled);
  }
}

}  // namespace ferrum::cpu
