#include "rows.h"

namespace ferrum::cpu {
namespace {

/// The K largest of E probabilities, of equal ones the lowest expert first; a NaN is never larger, so K different experts are always found.
void select_top_k(const Kernels& kernels, const float* probability, int experts, int top_k, int32_t* ids, float* weights) {
  auto insert = [&](int expert, int at) {
    for (; at > 0 && probability[expert] > weights[at - 1]; --at) ids[at] = ids[at - 1], weights[at] = weights[at - 1];
    ids[at] = expert;
    weights[at] = probability[expert];
  };
  for (int e = 0; e < top_k; ++e) insert(e, e);
  for (int e = top_k; (e = kernels.next_greater(probability, e, experts, weights[top_k - 1])) < experts; ++e) insert(e, top_k - 1);
}

void normalize(float* weights, int count) {
  float sum = 0;
  for (int k = 0; k < count; ++k) sum += weights[k];
  for (int k = 0; k < count; ++k) weights[k] /= sum;
}

}  // namespace

void CpuBackend::route(const RouteArgs& args) {
  CpuRouting& routing = static_cast<CpuRouting&>(args.out);
  const CpuActivation& x = static_cast<const CpuActivation&>(args.x);
  const CpuWeight& router = static_cast<const CpuWeight&>(args.router);
  const int E = routing.experts, K = routing.top_k;
  routing.rows = args.rows;
  for (int i = 0; i < args.rows; ++i) columns_[i] = x.column(i);
  // One row of tokens per task would read the router again for each; blocks of rows of the router, as in `linear`, read it once.
  const int block = std::max(16, E / pool_.threads() / 16 * 16), tasks = (E + block - 1) / block;
  pool_.run(tasks, [&](int task, int thread) {
    const int first = task * block;
    float** out = scratch_[static_cast<size_t>(thread)].out;
    for (int i = 0; i < args.rows; ++i) out[i] = routing.logits + static_cast<size_t>(i) * static_cast<size_t>(E) + first;
    router.dot({.weights = router.row(0, first), .row_bytes = router.tensor.row_bytes(), .rows = std::min(block, E - first), .k = x.cols,
                .columns = columns_, .column_count = args.rows, .out = out, .scratch = scratch_[static_cast<size_t>(thread)].dot});
  });
  each_row(args.rows, E * K, [&](int i) {
    float* logits = routing.logits + static_cast<size_t>(i) * static_cast<size_t>(E);
    kernels_.softmax(logits, E);
    select_top_k(kernels_, logits, E, K, routing.ids + i * K, routing.weights + i * K);
    if (args.normalize) normalize(routing.weights + i * K, K);
  });
  group_pairs(routing);
}

/// Counting sort of the pairs by expert.
void CpuBackend::group_pairs(CpuRouting& r) {
  const int pairs = r.rows * r.top_k;
  std::fill_n(r.start, r.experts + 1, 0);
  for (int p = 0; p < pairs; ++p) ++r.start[r.ids[p] + 1];
  for (int e = 0; e < r.experts; ++e) r.start[e + 1] += r.start[e];
  for (int p = 0; p < pairs; ++p) r.pairs[r.start[r.ids[p]]++] = p;
  for (int e = r.experts; e > 0; --e) r.start[e] = r.start[e - 1];
  r.start[0] = 0;
  r.active_count = 0;
  for (int e = 0; e < r.experts; ++e)
    if (r.start[e + 1] > r.start[e]) r.active[r.active_count++] = e;
}

}  // namespace ferrum::cpu
