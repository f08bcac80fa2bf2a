#include "profiling_backend.h"

#include <algorithm>
#include <utility>

namespace ferrum {
namespace {

int64_t bytes(const Weight& weight) { return static_cast<int64_t>(weight.tensor.bytes()); }
int64_t weights(const Weight& weight) { return static_cast<int64_t>(weight.tensor.rows) * weight.tensor.cols; }  // of one expert
int64_t expert_bytes(const Weight& weight) { return bytes(weight) / weight.tensor.experts; }

}  // namespace

void PhaseProfile::add(const OpProfile& op) {
  auto found = std::find_if(ops.begin(), ops.end(), [&](const OpProfile& known) { return known.name == op.name; });
  if (found == ops.end()) found = ops.insert(ops.end(), {op.name, 0, 0, {}});
  found->calls += op.calls;
  found->seconds += op.seconds;
  found->cost.bytes += op.cost.bytes;
  found->cost.macs += op.cost.macs;
}

template <class F> void ProfilingBackend::measure(const char* name, const OpCost& cost, F&& call) {
  const bool in_step = std::exchange(in_step_, false);  // a call that throws ends the step
  const Clock::time_point start = Clock::now();
  call();
  inner().finish();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  in_step_ = in_step;
  (in_step ? step_ : profile_.phases[phase_]).add({name, 1, seconds, cost});
}

std::unique_ptr<Kv> ProfilingBackend::make_kv(const KvShape& shape) {
  kv_shape_ = shape;
  return ForwardingBackend::make_kv(shape);
}

int64_t ProfilingBackend::token_bytes() const {
  KvShape one = kv_shape_;
  one.layers = one.blocks = 1;
  return static_cast<int64_t>(inner().kv_bytes(one)) / kv_block_tokens;
}

void ProfilingBackend::begin(const Batch& batch) {
  step_start_ = Clock::now();
  batch_ = &batch;
  const bool single_tokens = batch.tokens == batch.sequences;
  step_ = {};
  phase_ = !single_tokens ? Profile::Prefill : batch.sequences == 1 ? Profile::Decode : Profile::BatchedDecode;
  in_step_ = false;
  inner().begin(batch);
  in_step_ = true;
}

void ProfilingBackend::finish() {
  const bool in_step = std::exchange(in_step_, false);
  inner().finish();
  if (!in_step) return;
  PhaseProfile& phase = profile_.phases[phase_];
  ++phase.steps;
  phase.tokens += batch_->tokens;
  phase.seconds += std::chrono::duration<double>(Clock::now() - step_start_).count();
  for (const OpProfile& op : step_.ops) phase.add(op);
}

void ProfilingBackend::embed(const EmbedArgs& a) {
  const OpCost cost{batch_->tokens * static_cast<int64_t>(a.table.tensor.row_bytes()), 0};
  measure("embed", cost, [&] { inner().embed(a); });
}

void ProfilingBackend::norm(const NormArgs& a) {
  measure("norm", {bytes(a.weight), 0}, [&] { inner().norm(a); });
}

void ProfilingBackend::linear(const LinearArgs& a) {
  OpCost cost;
  for (const Weight* weight : a.weights) {
    cost.bytes += bytes(*weight);
    cost.macs += a.rows * weights(*weight);
  }
  measure(a.name, cost, [&] { inner().linear(a); });
}

void ProfilingBackend::qk_norm_rope_cache(const QkNormRopeCacheArgs& a) {
  OpCost cost{batch_->tokens * token_bytes(), 0};
  for (const Weight* norm : {a.q_norm, a.k_norm})
    if (norm) cost.bytes += bytes(*norm);
  measure("qk_norm_rope_cache", cost, [&] { inner().qk_norm_rope_cache(a); });
}

void ProfilingBackend::attention(const AttentionArgs& a) {
  OpCost cost;
  for (int32_t length : batch_->context_length) cost.bytes += length * token_bytes();
  for (int32_t position : batch_->positions) cost.macs += 2 * static_cast<int64_t>(a.shape.heads) * a.shape.head_dim * (position + 1);
  measure("attention", cost, [&] { inner().attention(a); });
}

void ProfilingBackend::route(const RouteArgs& a) {
  measure("route", {bytes(a.router), a.rows * weights(a.router)}, [&] { inner().route(a); });
  read_routed(a);
}

void ProfilingBackend::read_routed(const RouteArgs& a) {
  const auto experts = static_cast<size_t>(a.router.tensor.rows), pairs = static_cast<size_t>(a.rows) * static_cast<size_t>(a.top_k);
  ids_.resize(pairs);
  weights_.resize(pairs);
  pairs_.resize(pairs);
  start_.resize(experts + 1);
  inner().read_routing(a.out, {ids_.data(), weights_.data(), start_.data(), pairs_.data()});
  routed_ = {0, static_cast<int64_t>(pairs)};
  for (size_t e = 0; e < experts; ++e) routed_.experts += start_[e + 1] > start_[e];
}

void ProfilingBackend::experts_gate_up(const ExpertsGateUpArgs& a) {
  const OpCost cost{routed_.experts * (expert_bytes(a.gate) + expert_bytes(a.up)), routed_.pairs * (weights(a.gate) + weights(a.up))};
  measure("experts_gate_up", cost, [&] { inner().experts_gate_up(a); });
}

void ProfilingBackend::experts_down(const ExpertsDownArgs& a) {
  measure("experts_down", {routed_.experts * expert_bytes(a.down), routed_.pairs * weights(a.down)}, [&] { inner().experts_down(a); });
}

void ProfilingBackend::gather_rows(const Activation& x, Activation& out) {
  measure("gather_rows", {}, [&] { inner().gather_rows(x, out); });
}

void ProfilingBackend::gather_rows(const Tensor& x, const Tensor& out) {
  measure("gather_rows", {}, [&] { inner().gather_rows(x, out); });
}

void ProfilingBackend::top_candidates(const TopCandidatesArgs& a) {
  const OpCost cost{static_cast<int64_t>(a.logits.rows) * a.logits.cols * static_cast<int64_t>(sizeof(float)), 0};
  measure("top_candidates", cost, [&] { inner().top_candidates(a); });
}

void ProfilingBackend::copy_kv_blocks(Kv& kv, std::span<const BlockCopy> copies) {
  const OpCost cost{2 * static_cast<int64_t>(copies.size()) * kv_shape_.layers * kv_block_tokens * token_bytes(), 0};
  measure("copy_kv_blocks", cost, [&] { inner().copy_kv_blocks(kv, copies); });
}

}  // namespace ferrum
