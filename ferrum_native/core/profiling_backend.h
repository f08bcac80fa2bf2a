// Counts the time, bytes and products of every op of another backend, by the kind of step.
#pragma once
#include <chrono>

#include "forwarding_backend.h"
#include "profile.h"

namespace ferrum {

/// Waits for the device after every op, so that its time is its own. A step with a sequence of more than one token is "prefill", one token of
/// one sequence "decode", of several "batched decode". Calls between two steps (candidates, copies of held blocks) count to the phase of the
/// step before; a failed step or call does not count.
class ProfilingBackend final : public ForwardingBackend {
 public:
  explicit ProfilingBackend(std::unique_ptr<Backend> inner) : ForwardingBackend(std::move(inner)) {}

  std::unique_ptr<Kv> make_kv(const KvShape& shape) override;
  Profile* profile() override { return &profile_; }

  void begin(const Batch& batch) override;
  void embed(const EmbedArgs&) override;
  void norm(const NormArgs&) override;
  void linear(const LinearArgs&) override;
  void qk_norm_rope_cache(const QkNormRopeCacheArgs&) override;
  void attention(const AttentionArgs&) override;
  void route(const RouteArgs&) override;
  void experts_gate_up(const ExpertsGateUpArgs&) override;
  void experts_down(const ExpertsDownArgs&) override;
  void gather_rows(const Activation& x, Activation& out) override;
  void gather_rows(const Tensor& x, const Tensor& out) override;
  void top_candidates(const TopCandidatesArgs&) override;
  void copy_kv_blocks(Kv&, std::span<const BlockCopy>) override;
  void finish() override;

 private:
  using Clock = std::chrono::steady_clock;
  template <class F> void measure(const char* name, const OpCost& cost, F&& call);
  /// Keys and values of one token in one layer.
  int64_t token_bytes() const;
  void read_routed(const RouteArgs&);

  Profile profile_;
  Profile::Phase phase_ = Profile::Prefill;
  bool in_step_ = false;
  PhaseProfile step_;  // under way
  Clock::time_point step_start_;
  const Batch* batch_ = nullptr;
  KvShape kv_shape_{};
  struct Routed { int64_t experts = 0, pairs = 0; } routed_;  // what the last `route` chose: different experts, (token, expert) pairs
  std::vector<int32_t> ids_, start_, pairs_;
  std::vector<float> weights_;
};

}  // namespace ferrum
