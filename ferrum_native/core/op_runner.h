// Runs single ops of any backend on host arrays: how tests and tools look at one op. No product path goes through here.
#pragma once
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "backend.h"

namespace ferrum {

/// A weight that owns the bytes it is placed over, as a mapping would.
struct OwnedWeight {
  struct Free { void operator()(std::byte* bytes) const { std::free(bytes); } };
  std::unique_ptr<std::byte, Free> bytes;
  std::unique_ptr<Weight> weight;
};

// Host arrays of an op's arguments; the fields are those of the args struct of the same name in backend.h.
struct HostNorm {
  float* residual;     // [rows, out.cols], updated in place
  const float* delta;  // or null
  const Weight* weight;
  float eps;
  int rows;
  Activation* out;
};
struct HostQkv {
  const float* qkv;
  const Weight* q_norm;  // or null
  const Weight* k_norm;  // or null
  float eps;
  HeadShape shape;
  int rotary_dim, layer;
  Kv* kv;
  float* q_out;
};
struct HostAttention {
  const float* q;
  const Kv* kv;
  int layer;
  HeadShape shape;
  float scale;
  Activation* out;
};
struct HostRoute {
  const Activation* x;
  int rows;
  const Weight* router;
  int top_k;
  bool normalize;
  Routing* out;
};
struct HostExperts {
  const Activation* x;
  const Routing* routing;
  int rows, top_k;             // tokens, experts of each
  const Weight *first, *second;  // gate and up, or down and null
};

/// Every call uploads, runs one op with scratch for exactly that op, waits, and copies back. Arguments are the caller's to check.
class OpRunner {
 public:
  explicit OpRunner(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}
  Backend& backend() { return *backend_; }

  /// Copies `tensor.bytes()` bytes. Throws InvalidArgument for a ggml type id that ferrum does not compute with.
  std::unique_ptr<OwnedWeight> place_weight(int type_id, WeightTensor tensor);
  std::unique_ptr<Activation> make_activation(int rows, int cols, const std::vector<int>& consumer_type_ids);
  void write_activation(Activation&, int rows, const float* values);
  void read_activation(const Activation&, int rows, float* out);

  void embed(const Batch&, const Weight& table, float* out);
  void norm(const HostNorm&);
  void linear(const Activation& x, int rows, const std::vector<const Weight*>& weights, float* out);
  void qk_norm_rope_cache(const Batch&, const HostQkv&);
  void attention(const Batch&, const HostAttention&);
  void route(const HostRoute&);
  void experts_gate_up(const HostExperts&, Activation& out);
  void experts_down(const HostExperts&, float* out);
  void gather_activation(const Batch&, const Activation& x, Activation& out);
  void gather_values(const Batch&, const float* x, int cols, float* out);
  /// `values` [rows, vocab] are uploaded, and read back after the op.
  void top_candidates(float* values, int rows, int vocab, TopCandidatesArgs args);
  void copy_kv_blocks(Kv&, const std::vector<BlockCopy>& copies);
  void poison_kv_blocks(Kv&, const std::vector<int32_t>& blocks);

 private:
  struct Upload {
    std::shared_ptr<Buffer> buffer;
    Tensor tensor;
  };
  Upload upload(const float* values, int rows, int cols);  // zeros where `values` is null
  void reserve(const Batch&, const HeadShape&, int largest_cols);
  void reserve_rows(int rows, int largest_cols, int top_k);

  std::unique_ptr<Backend> backend_;
};

}  // namespace ferrum
