// Qwen3-MoE: grouped-query attention with QK-norm and RoPE, then a router and its top-k experts (Qwen3 technical report, 2025;
// tensor names of GGUF architecture qwen3moe).
#pragma once
#include <memory>
#include <vector>

#include "model.h"
#include "rope.h"

namespace ferrum {

struct Qwen3MoeConfig {
  ModelShape shape;
  int num_experts = 0, expert_ffn_size = 0;
  bool norm_topk_prob = true, tied_embeddings = false;
  float rms_eps = 0;
  Rope rope;

  explicit Qwen3MoeConfig(const ModelDescription&);
};

class Qwen3Moe final : public Model {
 public:
  explicit Qwen3Moe(const ModelDescription&);

  const ModelShape& shape() const override { return config_.shape; }
  ConfigList config() const override;
  ModelMemory memory(const Backend&, const StepLimits&) override;
  void load(Backend&, const StepLimits&) override;
  void rope_cos_sin(const int32_t* positions, int count, float* out) const override { config_.rope.cos_sin(positions, count, out); }
  void forward(Backend&, const Batch&, Kv&, const Tensor& logits) override;
  const Weights& weights() const override { return weights_; }

 private:
  struct Layer {
    std::unique_ptr<Weight> attn_norm, q, k, v, q_norm, k_norm, o, ffn_norm, router, gate, up, down;
  };
  /// What flows between the ops; `last_*` are the rows whose logits are wanted.
  struct Scratch {
    Tensor residual, delta, qkv, q, last_residual;
    std::unique_ptr<Activation> normed, attended, expert_hidden, last_attended;
    std::unique_ptr<Routing> routing;
  };

  // T tokens, H hidden, F expert width: the one list of weights and the one list of scratch, for planning and for loading.
  template <class Place> void visit_weights(Place place);
  template <class Visitor> void visit_scratch(const StepLimits&, Visitor& visitor);
  /// The rows of a sublayer: all tokens, or the logit rows in the last layer.
  struct Rows {
    Tensor residual;
    Activation* attended;
    int count;
  };
  void attention_block(Backend&, const Layer&, int layer, const Batch&, Kv&);
  void moe_block(Backend&, const Layer&, const Rows&);
  Rows rows_after_attention(Backend&, bool last, const Batch&);

  Qwen3MoeConfig config_;
  Weights weights_;
  std::unique_ptr<Weight> token_embedding_, output_norm_, output_;
  std::vector<Layer> layers_;
  std::shared_ptr<Buffer> arena_;
  Scratch scratch_;
};

}  // namespace ferrum
