// The largest logits: uploads of the call's edits and targets, the dispatches, and what the host adds to their sums.
#include <algorithm>
#include <tuple>

#include "metal_backend.h"

namespace ferrum::metal {

MetalBackend::CandidatesLayout::CandidatesLayout(const TopCandidatesArgs& a) : segments(shared::candidates_segments(a.logits.cols, a.count)) {
  const auto L = static_cast<size_t>(a.logits.rows), n = static_cast<size_t>(a.count), V = static_cast<size_t>(a.logits.cols);
  chunks = static_cast<int>(groups_for(a.logits.cols, shared::candidates_sum_chunk));
  Layout layout;
  edits = layout.piece(a.edits.size() * sizeof(shared::CandidateEdit));
  saved = layout.piece(a.edits.size() * sizeof(float));
  target_rows = layout.piece(a.targets.size() * sizeof(int32_t));
  targets = layout.piece(a.targets.size() * sizeof(int32_t));
  target_logits = layout.piece(a.targets.size() * sizeof(float));
  excluded = layout.piece((V + 31) / 32 * sizeof(uint32_t));
  temperatures = layout.piece(L * sizeof(float));
  sums = layout.piece(L * static_cast<size_t>(chunks) * 4 * sizeof(float));
  const size_t filtered = segments > 1 ? L * static_cast<size_t>(segments) * n : 0;
  keys = layout.piece(filtered * sizeof(uint32_t));
  key_ids = layout.piece(filtered * sizeof(int32_t));
  values = layout.piece(L * n * sizeof(float));
  ids = layout.piece(L * n * sizeof(int32_t));
  bytes = layout.bytes();
}

void MetalBackend::upload_candidates(const TopCandidatesArgs& a, const CandidatesLayout& at) {
  std::vector<const LogitEdit*> order;
  for (const LogitEdit& edit : a.edits) order.push_back(&edit);
  std::sort(order.begin(), order.end(), [](const LogitEdit* x, const LogitEdit* y) { return std::tie(x->row, x->token, x) < std::tie(y->row, y->token, y); });
  auto* edits = candidates_.host<shared::CandidateEdit>(at.edits);
  for (const LogitEdit* edit : order) *edits++ = {edit->row, edit->token, edit->penalty, edit->bias};
  auto* target_rows = candidates_.host<int32_t>(at.target_rows);
  for (size_t row = 0; row + 1 < a.target_start.size(); ++row) std::fill(target_rows + a.target_start[row], target_rows + a.target_start[row + 1], static_cast<int32_t>(row));
  std::copy(a.targets.begin(), a.targets.end(), candidates_.host<int32_t>(at.targets));
  auto* excluded = candidates_.host<uint32_t>(at.excluded);
  std::fill_n(excluded, groups_for(a.logits.cols, 32), 0u);
  for (int32_t id : a.excluded) excluded[id / 32] |= 1u << (id % 32);
  std::copy(a.temperatures.begin(), a.temperatures.end(), candidates_.host<float>(at.temperatures));
  ++counters_.uploads;
}

void MetalBackend::top_candidates(const TopCandidatesArgs& a) {
  const CandidatesLayout at(a);
  candidates_.reserve(at.bytes);
  upload_candidates(a, at);
  pending_.emplace(PendingCandidates{a, at, {}});
  auto* logits_on_host = reinterpret_cast<float*>(a.logits.buffer->host() + a.logits.offset);
  for (const LogitEdit& edit : a.edits) {
    float* logit = logits_on_host + static_cast<size_t>(edit.row) * static_cast<size_t>(a.logits.cols) + edit.token;
    pending_->originals.emplace_back(logit, *logit);
  }

  const auto L = static_cast<size_t>(a.logits.rows);
  const int edits = static_cast<int>(a.edits.size()), targets = static_cast<int>(a.targets.size());
  auto args = [&](int items) { return shared::TopCandidatesArgs{a.logits.cols, a.count, at.segments, items}; };
  auto piece = [&](size_t offset) { return candidates_.place(offset); };
  const Place logits = place(a.logits), values = piece(at.values), ids = piece(at.ids), excluded = piece(at.excluded);
  constexpr int item_threads = shared::candidates_edit_threads;
  const Grid per_edit{{groups_for(edits, item_threads)}, item_threads};
  const Grid chunks{{static_cast<size_t>(at.chunks), L}, shared::candidates_sum_threads, shared::candidates_sum_threadgroup_bytes};
  const Grid segments{{static_cast<size_t>(at.segments), L}, shared::candidates_threads, shared::candidates_threadgroup_bytes};
  const Grid rows{{L}, shared::candidates_threads, shared::candidates_threadgroup_bytes};

  encode({"top_candidates_edit"}, args(edits), {piece(at.edits), logits, piece(at.saved)}, per_edit);
  encode({"top_candidates_targets"}, args(targets), {piece(at.target_rows), piece(at.targets), logits, piece(at.target_logits)}, {{groups_for(targets, item_threads)}, item_threads});
  encode({"top_candidates_sums"}, args(0), {logits, excluded, piece(at.temperatures), piece(at.sums)}, chunks);
  if (at.segments > 1) {
    encode({"top_candidates_filter"}, args(0), {logits, excluded, piece(at.keys), piece(at.key_ids)}, segments);
    encode({"top_candidates_merge"}, args(0), {piece(at.keys), piece(at.key_ids), logits, values, ids}, rows);
  } else {
    encode({"top_candidates_select"}, args(0), {logits, excluded, values, ids}, rows);
  }
  encode({"top_candidates_restore"}, args(edits), {piece(at.edits), logits, piece(at.saved)}, per_edit);
}

void MetalBackend::deliver_candidates() {
  if (!pending_) return;
  const TopCandidatesArgs& a = pending_->args;
  const CandidatesLayout& at = pending_->layout;
  const size_t n = static_cast<size_t>(a.logits.rows) * static_cast<size_t>(a.count);
  std::copy_n(candidates_.host<int32_t>(at.ids), n, a.ids);
  std::copy_n(candidates_.host<float>(at.values), n, a.values);
  std::copy_n(candidates_.host<float>(at.target_logits), a.targets.size(), a.target_logits);
  for (int r = 0; r < a.logits.rows; ++r) {
    const float* sums = candidates_.host<float>(at.sums) + r * at.chunks * 4;
    const auto temperature = static_cast<double>(a.temperatures[static_cast<size_t>(r)]);
    shared::candidates_log_sum_exp(sums, at.chunks, temperature, a.log_sum_exp[r], a.log_sum_exp_at_temperature[r]);
  }
  pending_.reset();
}

}  // namespace ferrum::metal
