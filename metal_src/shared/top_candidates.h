// top_candidates: of each row of logits [L, vocab] the n largest with their ids (ties by rising id), sums of exponentials, logits of targets.
// Ids with a bit in `excluded` are never taken nor summed. -inf and NaN come last, by rising id, with the value -inf.
// In this order; the first two and the last where there are edits or targets:
//
// kernel                   buffers after args                                                                 grid (threadgroups)              threads
// top_candidates_edit      edits CandidateEdit [edits], sorted by (row, token), of the same pair in the       (ceil(edits / 256))              256
//                          order of the call; logits float [L, vocab], edited; saved float [edits]
// top_candidates_targets   rows int32 [targets]; ids int32 [targets]; logits; out float [targets]             (ceil(targets / 256))            256
// top_candidates_sums      logits; excluded uint32 [ceil(vocab / 32)]; temperatures float [L];                (chunks, L)                      candidates_sum_threads
//                          sums float [L, chunks, 4]: largest, sum, sum at temperature, number of            threadgroup 0: candidates_sum_threadgroup_bytes
//                          logits above -inf; chunks = ceil(vocab / candidates_sum_chunk)
// top_candidates_filter    logits; excluded; keys uint32 [L, segments, n]; ids int32 [L, segments, n]         (segments, L)                    candidates_threads
//                          only where candidates_segments > 1                                                threadgroup 0: candidates_threadgroup_bytes
// top_candidates_merge     keys; ids; logits; out_values float [L, n]; out_ids int32 [L, n]                   (L)                              candidates_threads
//                          after top_candidates_filter                                                       threadgroup 0: candidates_threadgroup_bytes
// top_candidates_select    logits; excluded; out_values; out_ids                                              (L)                              candidates_threads
//                          where candidates_segments = 1                                                     threadgroup 0: candidates_threadgroup_bytes
// top_candidates_restore   edits; logits; saved                                                               (ceil(edits / 256))              256
//
// Log-sum-exp of a row is the host's, in double, by `candidates_log_sum_exp`: with M the largest of its chunks' largest, M + log(sum over chunks c of
// sum_c exp(largest_c - M)), and at temperature t M / t + log(sum of sum_at_temperature_c exp((largest_c - M) / t)); -inf where nothing is above -inf.
#pragma once
#include "integers.h"

#ifndef __METAL_VERSION__
#include <cmath>
#include <limits>
#endif

namespace ferrum {
namespace shared {

enum {
  candidates_threads = 512,
  candidates_edit_threads = 256,
  candidates_sum_threads = 256, candidates_sum_chunk = 8192,
  candidates_segment = 4096,       // logits of a segment of the filter
  candidates_filter_most = 256,    // largest n that is worth a filter
  candidates_sort_in_group = 1024, // longest list that is sorted in threadgroup memory
  candidates_threadgroup_bytes = 8 * candidates_sort_in_group + 2048,
  candidates_sum_threadgroup_bytes = 256
};

struct CandidateEdit {
  int32_t row, token;
  float penalty, bias;  // logit' = (logit > 0 ? logit / penalty : logit * penalty) + bias
};
static_assert(sizeof(CandidateEdit) == 16, "CandidateEdit is packed");

struct TopCandidatesArgs {
  int32_t vocab, count;    // count: n
  int32_t segments;        // of the filter; 1 without it
  int32_t items;           // edits or targets of the kernels that take them
};
static_assert(sizeof(TopCandidatesArgs) == 16, "TopCandidatesArgs is packed");

/// Segments that a row is filtered in, first the n largest of each; 1: no filter.
inline int32_t candidates_segments(int32_t vocab, int32_t count) {
  return count > candidates_filter_most ? 1 : (vocab + candidates_segment - 1) / candidates_segment;
}

#ifndef __METAL_VERSION__

/// From the sums [chunks, 4] of a row.
inline void candidates_log_sum_exp(const float* sums, int32_t chunks, double temperature, double& plain, double& at_temperature) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0, sum_at_temperature = 0;
  for (int32_t c = 0; c < chunks; ++c)
    if (sums[4 * c + 3] > 0 && sums[4 * c] > largest) largest = sums[4 * c];
  for (int32_t c = 0; c < chunks; ++c) {
    if (sums[4 * c + 1] == 0) continue;  // nothing above -inf, and no NaN
    const double below = sums[4 * c] - largest;
    sum += sums[4 * c + 1] * std::exp(below);
    sum_at_temperature += sums[4 * c + 2] * std::exp(below / temperature);
  }
  const bool none = std::isinf(largest) && largest < 0;
  plain = none ? largest : largest + std::log(sum);
  at_temperature = none ? largest : largest / temperature + std::log(sum_at_temperature);
}

#endif

}  // namespace shared
}  // namespace ferrum
