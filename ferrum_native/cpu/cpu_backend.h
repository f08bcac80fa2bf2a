// The CPU backend: one file per op; the maths of a row or tile is a kernel of the instruction set (kernels.h), the ops share out tasks.
//
// Promise: the bits of a token's logits do not depend on what else is in the batch, on the chunking of its prompt or on the threads.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "../core/backend.h"
#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace ferrum::cpu {

struct CpuOptions {
  int threads = 1;
  bool float_activations = false;  // for proof: no int8 packing anywhere
  std::string instruction_set;     // the name of a table of kernels.h; empty: the best this machine has
};

/// The kernels to use; throws Error(InvalidArgument) for a set that is unknown or that this machine lacks.
const Kernels& choose_kernels(const std::string& instruction_set);

struct CpuWeight final : Weight {
  CpuWeight(const WeightTensor& t, DotKernel d) : Weight(t), dot(d) {}
  const std::byte* row(int expert, int index) const {
    return tensor.data + (static_cast<size_t>(expert) * static_cast<size_t>(tensor.rows) + static_cast<size_t>(index)) * tensor.row_bytes();
  }
  const DotKernel dot;
};

struct CpuActivation final : Activation {
  CpuActivation(int rows, int cols, bool q8_32, bool q8_256);
  static size_t bytes(int rows, int cols, bool q8_32, bool q8_256);
  float* row(int index) const { return values + static_cast<size_t>(index) * static_cast<size_t>(cols); }
  Column column(int index) const;
  /// Fills the packed forms of one row from its float values.
  void pack(const Kernels&, int index);

  Arena arena;
  float* values;
  int8_t *q8_32 = nullptr, *q8_256 = nullptr;
  float *scale_32 = nullptr, *scale_256 = nullptr;
  int16_t *factor_32 = nullptr, *sums_16 = nullptr;
};

/// Pair p = token * top_k + k. `pairs` lists them expert by expert, each expert's by rising p: expert e has pairs[start[e]] .. pairs[start[e+1]-1].
struct CpuRouting final : Routing {
  CpuRouting(int rows, int top_k, int experts);
  static size_t bytes(int rows, int top_k, int experts);
  const int top_k, experts;
  int rows = 0, active_count = 0;
  Arena arena;
  float* logits;    // [rows, E]
  int32_t* ids;     // [rows * K]
  float* weights;   // [rows * K]
  int32_t* start;   // [E + 1]
  int32_t* pairs;   // [rows * K]
  int32_t* active;  // [active_count]: experts that have pairs
};

/// Keys [layer][block][kv head][head_dim][16 tokens] and values [layer][block][kv head][16 tokens][head_dim]; of Q8_0 both are
/// [layer][block][kv head] of KvGroupQ8_0 [head_dim / 32].
struct CpuKv final : Kv {
  explicit CpuKv(const KvShape&);
  size_t head_bytes() const { return kv_block_tokens * kv_row_bytes(shape.type, shape.head_dim); }
  size_t block_bytes() const { return head_bytes() * static_cast<size_t>(shape.heads); }
  size_t offset(int layer, int block, int head) const {
    return (static_cast<size_t>(layer) * static_cast<size_t>(shape.blocks) + static_cast<size_t>(block)) * block_bytes() + static_cast<size_t>(head) * head_bytes();
  }
  const KvShape shape;
  CpuBuffer keys, values;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions&);

  std::string name() const override;
  bool float_activations() const override { return options_.float_activations; }
  std::unique_ptr<Weight> place_weight(const WeightTensor&) override;
  size_t extra_weight_bytes(const WeightTensor&) const override { return 0; }
  std::shared_ptr<Buffer> allocate(size_t bytes) override { return std::make_shared<CpuBuffer>(bytes); }
  std::unique_ptr<Activation> make_activation(int rows, int cols, std::span<const WeightType> consumers) override;
  std::unique_ptr<Routing> make_routing(int rows, int top_k, int experts) override { return std::make_unique<CpuRouting>(rows, top_k, experts); }
  std::unique_ptr<Kv> make_kv(const KvShape& shape) override { return std::make_unique<CpuKv>(shape); }
  size_t activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const override;
  size_t routing_bytes(int rows, int top_k, int experts) const override { return CpuRouting::bytes(rows, top_k, experts); }
  size_t kv_bytes(const KvShape&) const override;
  size_t scratch_bytes(const StepLimits&) const override;
  void reserve_scratch(const StepLimits&) override;

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
  void read_kv(const Kv&, std::span<const int32_t> blocks, int tokens, std::byte* out) override;
  void write_kv(Kv&, std::span<const int32_t> blocks, int tokens, const std::byte* data) override;
  void poison_kv_blocks(Kv&, std::span<const int32_t> blocks) override;
  void finish() override {}
  void abandon() override {}
  void write_activation(Activation&, int rows, const float* values) override;
  void read_activation(const Activation&, int rows, float* out) override;
  void read_routing(const Routing&, const RoutingContents& out) override;
  double read_bandwidth(size_t most_bytes) override;
  double product_rate() override;

 private:
  /// One thread's own memory; sizes by the step's limits.
  struct ThreadScratch {
    std::byte* dot;    // dot_scratch_bytes
    float** out;       // [T]
    float* products;   // [product_floats_]
    float* attention;  // two partial results of a tile of queries
    int16_t* q_16;     // and its queries, where they are packed
    float* q_scale;
  };
  /// Fewest weight rows of one task of the experts' ops, for which a thread can keep the products of all pairs.
  static constexpr int expert_task_rows = 64;
  /// Tokens of a step, up to which the products of all experts' down projections are kept before they are added up.
  static constexpr int most_tokens_of_shared_products = 32;
  /// Prompt tokens that share one read of keys and values.
  static constexpr int query_tile = 8;
  /// Keys of one partial softmax; partial results are combined in order, so the bits do not depend on who computed them.
  static constexpr int split_keys = 512;
  /// A decode step with fewer (sequence, kv head) units than this shares out the splits of each.
  int units_to_split_below() const { return 4 * pool_.threads(); }

  /// Where scratch is laid out: counted with `take` null, taken otherwise.
  size_t visit_scratch(const StepLimits&, Arena* take, std::vector<ThreadScratch>& scratch, float*& splits, float*& shared_products, Column*& columns) const;
  size_t partial_floats(int rows, int head_dim) const { return static_cast<size_t>(rows) * static_cast<size_t>(head_dim + 2); }
  /// Calls f(row) for every row, on one thread where the work is too small to share.
  template <class F> void each_row(int rows, int cols, F&& f);
  void pack_rows(CpuActivation&, int rows);
  int rows_per_task(int rows) const;
  int expert_rows_per_task(int rows, int matrices, int columns) const;
  void group_pairs(CpuRouting&);
  /// Some tokens of one sequence, that share one read of keys and values.
  struct QueryTile { int sequence, first, queries; };
  void attend(const AttentionArgs&, const QueryTile&, int kv_head, int split, const ThreadScratch&, float* partial) const;
  void finish_tile(const AttentionArgs&, const QueryTile&, int kv_head, const float* total) const;

  const CpuOptions options_;
  const Kernels& kernels_;
  ThreadPool pool_;
  const Batch* batch_ = nullptr;
  std::vector<QueryTile> tiles_;  // of the batch
  std::unique_ptr<Arena> arena_;
  std::vector<ThreadScratch> scratch_;
  float* split_partials_ = nullptr;  // [units, splits] partial results of decode steps
  float* shared_products_ = nullptr; // [min(T, most_tokens_of_shared_products) K, largest_cols]
  Column* columns_ = nullptr;        // [T K]
  int product_floats_ = 0;           // of each thread
};

}  // namespace ferrum::cpu
