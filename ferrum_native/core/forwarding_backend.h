// The base of decorators: every call goes to another backend. A decorator overrides `around`, which wraps every call of a step, or single calls.
#pragma once
#include <functional>
#include <utility>

#include "backend.h"

namespace ferrum {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  std::string name() const override { return inner_->name(); }
  bool float_activations() const override { return inner_->float_activations(); }
  std::unique_ptr<Weight> place_weight(const WeightTensor& t) override { return inner_->place_weight(t); }
  size_t extra_weight_bytes(const WeightTensor& t) const override { return inner_->extra_weight_bytes(t); }
  std::shared_ptr<Buffer> allocate(size_t bytes) override { return inner_->allocate(bytes); }
  std::unique_ptr<Activation> make_activation(int rows, int cols, std::span<const WeightType> consumers) override { return inner_->make_activation(rows, cols, consumers); }
  std::unique_ptr<Routing> make_routing(int rows, int top_k, int experts) override { return inner_->make_routing(rows, top_k, experts); }
  std::unique_ptr<Kv> make_kv(const KvShape& shape) override { return inner_->make_kv(shape); }
  size_t activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const override { return inner_->activation_bytes(rows, cols, consumers); }
  size_t routing_bytes(int rows, int top_k, int experts) const override { return inner_->routing_bytes(rows, top_k, experts); }
  size_t kv_bytes(const KvShape& shape) const override { return inner_->kv_bytes(shape); }
  size_t scratch_bytes(const StepLimits& limits) const override { return inner_->scratch_bytes(limits); }
  void reserve_scratch(const StepLimits& limits) override { inner_->reserve_scratch(limits); }

  void begin(const Batch& batch) override { run("begin", [&] { inner_->begin(batch); }); }
  void embed(const EmbedArgs& args) override { run("embed", [&] { inner_->embed(args); }); }
  void norm(const NormArgs& args) override { run("norm", [&] { inner_->norm(args); }); }
  void linear(const LinearArgs& args) override { run("linear", [&] { inner_->linear(args); }); }
  void qk_norm_rope_cache(const QkNormRopeCacheArgs& args) override { run("qk_norm_rope_cache", [&] { inner_->qk_norm_rope_cache(args); }); }
  void attention(const AttentionArgs& args) override { run("attention", [&] { inner_->attention(args); }); }
  void route(const RouteArgs& args) override { run("route", [&] { inner_->route(args); }); }
  void experts_gate_up(const ExpertsGateUpArgs& args) override { run("experts_gate_up", [&] { inner_->experts_gate_up(args); }); }
  void experts_down(const ExpertsDownArgs& args) override { run("experts_down", [&] { inner_->experts_down(args); }); }
  void gather_rows(const Activation& x, Activation& out) override { run("gather_rows", [&] { inner_->gather_rows(x, out); }); }
  void gather_rows(const Tensor& x, const Tensor& out) override { run("gather_rows", [&] { inner_->gather_rows(x, out); }); }
  void top_candidates(const TopCandidatesArgs& args) override { run("top_candidates", [&] { inner_->top_candidates(args); }); }
  void copy_kv_blocks(Kv& kv, std::span<const BlockCopy> copies) override { run("copy_kv_blocks", [&] { inner_->copy_kv_blocks(kv, copies); }); }
  void read_kv(const Kv& kv, std::span<const int32_t> blocks, int tokens, std::byte* out) override { run("read_kv", [&] { inner_->read_kv(kv, blocks, tokens, out); }); }
  void write_kv(Kv& kv, std::span<const int32_t> blocks, int tokens, const std::byte* data) override { run("write_kv", [&] { inner_->write_kv(kv, blocks, tokens, data); }); }
  void finish() override { run("finish", [&] { inner_->finish(); }); }

  void abandon() override { inner_->abandon(); }
  void poison_kv_blocks(Kv& kv, std::span<const int32_t> blocks) override { inner_->poison_kv_blocks(kv, blocks); }
  void write_activation(Activation& x, int rows, const float* values) override { inner_->write_activation(x, rows, values); }
  void read_activation(const Activation& x, int rows, float* out) override { inner_->read_activation(x, rows, out); }
  void read_routing(const Routing& routing, const RoutingContents& out) override { inner_->read_routing(routing, out); }
  double read_bandwidth(size_t most_bytes) override { return inner_->read_bandwidth(most_bytes); }
  double product_rate() override { return inner_->product_rate(); }
  Profile* profile() override { return inner_->profile(); }
  const DeviceCounters* counters() const override { return inner_->counters(); }

 protected:
  /// Called for every call of a step; runs `call`, which is the inner backend's.
  virtual void around(const char* /*op*/, const std::function<void()>& call) { call(); }
  Backend& inner() const { return *inner_; }

 private:
  template <class F> void run(const char* op, F&& call) {
    around(op, [&call] { call(); });
  }

  std::unique_ptr<Backend> inner_;
};

}  // namespace ferrum
