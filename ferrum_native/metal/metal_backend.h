// The Metal backend: ops encode dispatches into one command buffer, `finish` runs it and waits. The kernels and what they take are described in
// metal_src/shared/, one header per op.
//
// Promise: float32 activations and accumulators everywhere; values of an op differ from the CPU's by the order of float additions only.
#pragma once
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "../../metal_src/shared/top_candidates.h"
#include "command_stream.h"
#include "memory.h"
#include "step_data.h"

namespace ferrum::metal {

class MetalBackend final : public Backend {
 public:
  explicit MetalBackend(const KernelSource&);

  std::string name() const override;
  bool float_activations() const override { return true; }
  std::unique_ptr<Weight> place_weight(const WeightTensor&) override;
  size_t extra_weight_bytes(const WeightTensor&) const override { return 0; }
  std::shared_ptr<Buffer> allocate(size_t bytes) override { return device_.allocate(bytes); }
  std::unique_ptr<Activation> make_activation(int rows, int cols, std::span<const WeightType> consumers) override;
  std::unique_ptr<Routing> make_routing(int rows, int top_k, int experts) override;
  std::unique_ptr<Kv> make_kv(const KvShape&) override;
  size_t activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const override;
  size_t routing_bytes(int rows, int top_k, int experts) const override;
  size_t kv_bytes(const KvShape&) const override;
  size_t scratch_bytes(const StepLimits&) const override;
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
  double read_bandwidth(size_t most_bytes) override;
  const DeviceCounters* counters() const override { return &counters_; }

 private:
  struct Grid {
    Groups groups;
    int threads;
    size_t threadgroup_bytes = 0;
  };
  struct ScratchLayout {
    explicit ScratchLayout(const StepLimits&);
    size_t attention_values, attention_stats, products, bytes;
  };
  /// Pieces of `candidates_`, for one call's arguments.
  struct CandidatesLayout {
    explicit CandidatesLayout(const TopCandidatesArgs&);
    int segments, chunks;
    size_t edits, saved, target_rows, targets, target_logits, excluded, temperatures, sums, keys, key_ids, values, ids, bytes;
  };
  /// A call whose results `finish` brings to the host.
  struct PendingCandidates {
    TopCandidatesArgs args;
    CandidatesLayout layout;
    std::vector<std::pair<float*, float>> originals;  // logits that edits change, for a device that fails in between
  };

  template <class Args> void encode(const Kernel& kernel, const Args& args, std::initializer_list<Place> buffers, const Grid& grid) {
    stream_.encode({.pipeline = device_.pipeline(kernel), .args = std::as_bytes(std::span(&args, 1)), .buffers = {buffers.begin(), buffers.size()}, .groups = grid.groups,
                    .threads = static_cast<size_t>(grid.threads), .threadgroup_bytes = grid.threadgroup_bytes});
  }
  /// Where kernels read how many rows a call has.
  Place count_of(int rows);
  void gather(const Place& x, int cols, const Place& out);
  void upload_candidates(const TopCandidatesArgs&, const CandidatesLayout&);
  void deliver_candidates();
  Place scratch(size_t offset) const { return {scratch_->get(), offset}; }

  DeviceCounters counters_;
  Device device_;
  CommandStream stream_;
  StepData step_;
  std::unique_ptr<MetalBuffer> scratch_;
  ScratchLayout scratch_layout_;
  Room block_copies_, candidates_;
  std::optional<PendingCandidates> pending_;
};

/// Rows of the largest decode batch whose ops take one dispatch each, attention aside: the kernels for few rows.
constexpr int most_decode_rows = 32;

inline size_t groups_for(int items, int of_group) { return static_cast<size_t>((items + of_group - 1) / of_group); }

}  // namespace ferrum::metal
