// The waist: what a device does for a model. Read this first.
//
// T tokens of the batch, S its sequences, L its logit rows, n rows of this call, H hidden, D head_dim, E experts, K top_k, F expert width.
// Every op is mandatory on every backend and only enqueues; host memory is readable after `finish`. Arguments are validated by the engine
// and the model: ops trust them. Weights of any type of `weight_types` are taken everywhere, norms are F32.
#pragma once
#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "batch.h"
#include "error.h"
#include "kv_type.h"
#include "profile.h"
#include "tensor.h"

namespace ferrum {

struct KvShape {
  int layers, blocks, heads, head_dim;
  KvType type;
};

struct HeadShape { int heads, kv_heads, head_dim; };

/// Largest step that scratch must take.
struct StepLimits {
  int tokens, sequences, logit_rows;
  int context;       // tokens of the longest sequence
  HeadShape heads;
  int largest_cols;  // of any matrix
  int top_k;
};

struct EmbedArgs {
  const Weight& table;  // [vocab, H]
  Tensor out;           // [T, H]: rows of the batch's token ids
};
struct NormArgs {
  Tensor residual;      // [n, H]: residual += delta, if there is one
  const Tensor* delta;  // [n, H] or null
  const Weight& weight; // [H]
  float eps;
  int rows;             // n
  Activation& out;      // [n, H]: residual / rms(residual) * weight
};
struct LinearArgs {
  const char* name = "linear";              // what it is in the model, for profiles: "qkv"
  const Activation& x;                      // [n, C]
  int rows;                                 // n
  std::span<const Weight* const> weights;   // one to three of [R_i, C], each of its own type
  Tensor out;                               // [n, R_1 + R_2 + ...], side by side
};
struct QkNormRopeCacheArgs {
  Tensor qkv;            // [T, (heads + 2 kv_heads) D]: q, k, v side by side
  const Weight* q_norm;  // [D] or null
  const Weight* k_norm;  // [D] or null
  float eps;
  HeadShape shape;
  int rotary_dim;        // leading values of a head that are rotated; value i pairs with i + rotary_dim / 2 (NEOX)
  int layer;
  Kv& kv;                // takes K and V at the batch's slots
  Tensor q_out;          // [T, heads D]
};
struct AttentionArgs {
  Tensor q;              // [T, heads D]
  const Kv& kv;
  int layer;
  HeadShape shape;
  float scale;
  Activation& out;       // [T, heads D]: causal over the sequence's tokens up to the query's own
};
struct RouteArgs {
  const Activation& x;   // [n, H]
  int rows;              // n
  const Weight& router;  // [E, H]
  int top_k;
  bool normalize;        // the K weights of a token sum to 1
  Routing& out;          // K largest of softmax over all E; of equal ones the lowest expert first
};
struct ExpertsGateUpArgs {
  const Activation& x;   // [n, H]
  const Routing& routing;
  const Weight& gate;    // [E, F, H]
  const Weight& up;      // [E, F, H]
  Activation& out;       // [n K, F]: silu(gate x) * (up x), row of a pair = token * K + k
};
struct ExpertsDownArgs {
  const Activation& x;   // [n K, F]
  const Routing& routing;
  const Weight& down;    // [E, H, F]
  Tensor out;            // [n, H]: weighted sum over k, in an order that depends on the token alone
};
struct LogitEdit {
  int32_t row, token;
  float penalty, bias;   // logit' = (logit > 0 ? logit / penalty : logit * penalty) + bias
};
struct TopCandidatesArgs {
  Tensor logits;                             // [L, vocab], left as it is
  int count;                                 // n largest of each row, 1 .. vocab less the excluded
  std::span<const int32_t> excluded;         // ids that are never candidates (rising), nor part of the sums
  std::span<const LogitEdit> edits;          // applied before, in this order
  std::span<const float> temperatures;       // [L], > 0
  std::span<const int32_t> target_start;     // [L + 1] into targets, or empty
  std::span<const int32_t> targets;          // ids whose logits (after edits) are wanted
  int32_t* ids;                              // out [L, n], by falling logit, ties by rising id
  float* values;                             // out [L, n]
  double* log_sum_exp;                       // out [L]
  double* log_sum_exp_at_temperature;        // out [L], of logits / temperature
  float* target_logits;                      // out [targets]
};
struct BlockCopy { int32_t from, to; };

/// What a device was asked to do since its backend was made.
struct DeviceCounters {
  int64_t dispatches = 0;       // kernels over a grid
  int64_t command_buffers = 0;  // each committed and waited for once
  int64_t uploads = 0;          // times that the host wrote data of a step or call into device memory
  int64_t pipelines = 0;        // kernels compiled
};

/// Where `read_routing` writes: n rows, pair p = row * K + k.
struct RoutingContents {
  int32_t* ids;    // [n K]
  float* weights;  // [n K]
  int32_t* start;  // [E + 1], where each expert's pairs begin in `pairs`
  int32_t* pairs;  // [n K], grouped by expert
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // as users read it: "cpu (avx2, 2 threads)"
  virtual bool float_activations() const = 0;  // whether products take activations as float32, whatever was asked for

  // Memory. All of it is taken at construction; nothing is allocated in a step.
  virtual std::unique_ptr<Weight> place_weight(const WeightTensor&) = 0;
  virtual size_t extra_weight_bytes(const WeightTensor&) const = 0;  // beyond the mapping
  virtual std::shared_ptr<Buffer> allocate(size_t bytes) = 0;        // visible to the host; zeroed
  /// Rows whose products with weights of the `consumers`' types are taken.
  virtual std::unique_ptr<Activation> make_activation(int rows, int cols, std::span<const WeightType> consumers) = 0;
  virtual std::unique_ptr<Routing> make_routing(int rows, int top_k, int experts) = 0;
  virtual std::unique_ptr<Kv> make_kv(const KvShape&) = 0;
  virtual size_t activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const = 0;
  virtual size_t routing_bytes(int rows, int top_k, int experts) const = 0;
  virtual size_t kv_bytes(const KvShape&) const = 0;
  virtual size_t scratch_bytes(const StepLimits&) const = 0;  // the backend's own
  virtual void reserve_scratch(const StepLimits&) = 0;

  // A step: begin, ops, finish. `begin` uploads the batch, which stays alive until `finish`.
  virtual void begin(const Batch&) = 0;
  virtual void embed(const EmbedArgs&) = 0;
  virtual void norm(const NormArgs&) = 0;
  virtual void linear(const LinearArgs&) = 0;
  virtual void qk_norm_rope_cache(const QkNormRopeCacheArgs&) = 0;
  virtual void attention(const AttentionArgs&) = 0;
  virtual void route(const RouteArgs&) = 0;
  virtual void experts_gate_up(const ExpertsGateUpArgs&) = 0;
  virtual void experts_down(const ExpertsDownArgs&) = 0;
  /// out row i = x row of the batch's logit row i.
  virtual void gather_rows(const Activation& x, Activation& out) = 0;
  virtual void gather_rows(const Tensor& x, const Tensor& out) = 0;
  virtual void top_candidates(const TopCandidatesArgs&) = 0;
  virtual void copy_kv_blocks(Kv&, std::span<const BlockCopy>) = 0;
  /// Fills blocks with NaN, at once, so that a test sees every read of memory that was given back.
  virtual void poison_kv_blocks(Kv&, std::span<const int32_t> blocks) = 0;
  /// The only wait; asynchronous device errors surface here. Outputs on the host, and what spans in the arguments show, live until then.
  virtual void finish() = 0;
  /// Drops what was enqueued since the last `finish`: after a call that threw.
  virtual void abandon() = 0;

  // Between steps, and at once: keys and values of the first `tokens` tokens of a block table, as [layers, 2, tokens, heads] of rows of
  // kv_row_bytes with the keys first: head_dim numbers of the KV's type, or BlockQ8_0 [head_dim / 32]. All tokens were written; the rest of the last block is left as it is.
  virtual void read_kv(const Kv&, std::span<const int32_t> blocks, int tokens, std::byte* out) = 0;
  virtual void write_kv(Kv&, std::span<const int32_t> blocks, int tokens, const std::byte* data) = 0;

  // For tests and tools; no step calls these.
  virtual void write_activation(Activation&, int rows, const float* values) = 0;  // and packs
  virtual void read_activation(const Activation&, int rows, float* out) = 0;
  virtual void read_routing(const Routing&, const RoutingContents& out) = 0;
  /// Bytes a second that the device reads from its memory with all it has, measured now over a fresh buffer of at most `most_bytes`.
  virtual double read_bandwidth(size_t most_bytes) = 0;
  /// Multiply-accumulates a second of products with Q4_K weights that lie in the cache, with all it has, measured now; 0 where that is not known.
  virtual double product_rate() { return 0; }
  /// What a profiling decorator has counted, for its reader to look at and reset; null where there is none.
  virtual Profile* profile() { return nullptr; }
  /// Null where the backend has no device that is asked for anything.
  virtual const DeviceCounters* counters() const { return nullptr; }
};

}  // namespace ferrum
