// Runs two backends op by op on the same inputs and stops at the first output that differs: how a faulty kernel is found.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"

namespace ferrum {

/// Before every op the inputs of `subject` are made those of `reference`, so that each op is judged by itself; keys and values are judged by what
/// attention makes of them. Where a value of an output differs by more than `tolerance` times the largest of its row, the op throws
/// Error(Device) with the op, its number in the step, the layer, the place and both values. What the caller reads is the reference's.
class ComparingBackend final : public Backend {
 public:
  ComparingBackend(std::unique_ptr<Backend> reference, std::unique_ptr<Backend> subject, double tolerance)
      : reference_(std::move(reference)), subject_(std::move(subject)), tolerance_(tolerance) {}

  std::string name() const override { return subject_->name() + " beside " + reference_->name(); }
  bool float_activations() const override { return reference_->float_activations(); }
  std::unique_ptr<Weight> place_weight(const WeightTensor&) override;
  size_t extra_weight_bytes(const WeightTensor& t) const override { return reference_->extra_weight_bytes(t) + subject_->extra_weight_bytes(t); }
  std::shared_ptr<Buffer> allocate(size_t bytes) override;
  std::unique_ptr<Activation> make_activation(int rows, int cols, std::span<const WeightType> consumers) override;
  std::unique_ptr<Routing> make_routing(int rows, int top_k, int experts) override;
  std::unique_ptr<Kv> make_kv(const KvShape&) override;
  size_t activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const override {
    return reference_->activation_bytes(rows, cols, consumers) + subject_->activation_bytes(rows, cols, consumers);
  }
  size_t routing_bytes(int rows, int top_k, int experts) const override { return reference_->routing_bytes(rows, top_k, experts) + subject_->routing_bytes(rows, top_k, experts); }
  size_t kv_bytes(const KvShape& shape) const override { return reference_->kv_bytes(shape) + subject_->kv_bytes(shape); }
  size_t scratch_bytes(const StepLimits& limits) const override { return reference_->scratch_bytes(limits) + subject_->scratch_bytes(limits); }
  void reserve_scratch(const StepLimits&) override;

  void begin(const Batch&) override;
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
  void read_kv(const Kv&, std::span<const int32_t> blocks, int tokens, std::byte* out) override;
  void write_kv(Kv&, std::span<const int32_t> blocks, int tokens, const std::byte* data) override;
  void poison_kv_blocks(Kv&, std::span<const int32_t> blocks) override;
  void finish() override;
  void abandon() override;

  void write_activation(Activation&, int rows, const float* values) override;
  void read_activation(const Activation&, int rows, float* out) override;
  void read_routing(const Routing&, const RoutingContents& out) override;
  double read_bandwidth(size_t most_bytes) override { return subject_->read_bandwidth(most_bytes); }
  double product_rate() override { return subject_->product_rate(); }
  const DeviceCounters* counters() const override { return subject_->counters(); }

 private:
  /// `run` on the reference, then on the subject, each to its end.
  void both(const char* op, const std::function<void(Backend&, bool subject)>& run);
  void share(const Tensor&);                   // the subject's values become the reference's
  void share(const Activation&, int rows);
  void compare(const char* what, const Tensor&);
  void compare(const char* what, const Activation&, int rows);
  void compare(const char* what, const float* expected, const float* got, int rows, int cols);
  [[noreturn]] void differ(const std::string& what) const;

  std::unique_ptr<Backend> reference_, subject_;
  const double tolerance_;
  std::string op_ = "nothing";
  int step_ = 0, call_ = 0, layer_ = -1;  // layer: of the last qk_norm_rope_cache
  int tokens_ = 0, logit_rows_ = 0;       // of the batch
  std::vector<float> expected_, got_;
};

}  // namespace ferrum
