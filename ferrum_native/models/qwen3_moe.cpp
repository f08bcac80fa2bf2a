#include "qwen3_moe.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace ferrum {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw Error(ErrorKind::UnsupportedModel, what); }

/// A count from 1 to `most`, which is far above any real model and keeps every product of two of them in range.
int count(const Metadata& metadata, const std::string& key, int most) {
  int value = metadata.integer(key);
  if (value < 1 || value > most)
    throw Error(ErrorKind::BadModelFile, "metadata key " + key + " is " + std::to_string(value) + ", not from 1 to " + std::to_string(most) + ". The file is damaged; convert the model again.");
  return value;
}

/// Keys of other families that would change the computation, with the values that leave it as it is.
void refuse_other_maths(const Metadata& metadata, const std::string& prefix) {
  struct Neutral { const char* key; double value, also; };
  constexpr Neutral table[] = {
      {"attention.sliding_window", 0, 0}, {"expert_shared_count", 0, 0}, {"expert_shared_feed_forward_length", 0, 0}, {"expert_weights_scale", 1, 0},
      {"expert_gating_func", 1, 0},  // 1: softmax
      {"expert_group_count", 1, 0}, {"expert_group_used_count", 1, 0}, {"leading_dense_block_count", 0, 0}, {"interleave_moe_layer_step", 1, 0},
      {"logit_scale", 1, 0}, {"residual_scale", 1, 0}, {"embedding_scale", 1, 0}, {"attention.scale", 0, 0}, {"attn_logit_softcapping", 0, 0},
      {"final_logit_softcapping", 0, 0}, {"nextn_predict_layers", 0, 0},
  };
  for (const Neutral& neutral : table) {
    const double value = metadata.real(prefix + neutral.key, neutral.value);
    if (value != neutral.value && value != neutral.also)
      refuse("the file sets " + prefix + neutral.key + ", which no Qwen3-MoE model has and ferrum does not compute. Its output would not be the model's.");
  }
}

}  // namespace

Qwen3MoeConfig::Qwen3MoeConfig(const ModelDescription& description) {
  const Metadata& m = description.metadata;
  const std::string a = description.architecture + ".";
  shape.layers = count(m, a + "block_count", 4096);
  shape.hidden_size = count(m, a + "embedding_length", 1 << 20);
  shape.context_length = count(m, a + "context_length", 1 << 30);
  shape.heads.heads = count(m, a + "attention.head_count", 1024);
  shape.heads.kv_heads = m.has(a + "attention.head_count_kv") ? count(m, a + "attention.head_count_kv", 1024) : shape.heads.heads;
  // key_length is the truth: hidden 2048 with 32 heads of 128 is the real shape.
  shape.heads.head_dim = m.has(a + "attention.key_length") ? count(m, a + "attention.key_length", 1 << 16) : shape.hidden_size / shape.heads.heads;
  shape.rotary_dim = m.integer(a + "rope.dimension_count", shape.heads.head_dim);
  num_experts = count(m, a + "expert_count", 1024);
  shape.top_k = count(m, a + "expert_used_count", 64);
  expert_ffn_size = count(m, a + "expert_feed_forward_length", 1 << 20);
  norm_topk_prob = m.boolean(a + "expert_weights_norm", true);
  const double eps = m.real(a + "attention.layer_norm_rms_epsilon");
  if (!(eps >= 0 && eps < 1)) throw Error(ErrorKind::BadModelFile, "metadata key " + a + "attention.layer_norm_rms_epsilon is not a number from 0 to 1. Convert the model again.");
  rms_eps = static_cast<float>(eps);

  auto embedding = description.tensors.find("token_embd.weight");
  if (embedding == description.tensors.end() || embedding->second.shape.size() != 2)
    throw Error(ErrorKind::BadModelFile, "tensor token_embd.weight is missing or not a matrix; it is where the vocabulary's size is read. The file is incomplete.");
  if (embedding->second.shape[0] > 1 << 24) refuse("the vocabulary has " + std::to_string(embedding->second.shape[0]) + " tokens; ferrum computes up to 16777216.");
  shape.vocab_size = static_cast<int>(embedding->second.shape[0]);
  tied_embeddings = description.tensors.count("output.weight") == 0;

  const HeadShape& h = shape.heads;
  if (h.heads % h.kv_heads != 0) refuse("attention.head_count " + std::to_string(h.heads) + " is not a multiple of attention.head_count_kv " + std::to_string(h.kv_heads) + ".");
  if (h.head_dim % 8 != 0 || h.head_dim > 512) refuse("attention.key_length is " + std::to_string(h.head_dim) + "; ferrum computes heads of a multiple of 8 up to 512.");
  if (m.integer(a + "attention.value_length", h.head_dim) != h.head_dim) refuse("attention.value_length differs from attention.key_length; no Qwen3-MoE model has that.");
  if (shape.rotary_dim < 2 || shape.rotary_dim > h.head_dim || shape.rotary_dim % 2 != 0)
    throw Error(ErrorKind::BadModelFile, "rope.dimension_count is " + std::to_string(shape.rotary_dim) + ", not an even number up to the head size. Convert the model again.");
  if (shape.top_k > num_experts) throw Error(ErrorKind::BadModelFile, "expert_used_count " + std::to_string(shape.top_k) + " is above expert_count " + std::to_string(num_experts) + ". The file is damaged.");
  refuse_other_maths(m, a);
  shape.largest_cols = std::max({shape.hidden_size, h.heads * h.head_dim, expert_ffn_size});
  rope = Rope::from(m, description.architecture, shape.rotary_dim);
}

Qwen3Moe::Qwen3Moe(const ModelDescription& description) : config_(description), weights_(description) {
  visit_weights([](const WeightTensor&, std::unique_ptr<Weight>&) {});
  weights_.check_all_used();
}

ConfigList Qwen3Moe::config() const {
  const ModelShape& s = config_.shape;
  auto integer = [](int x) { return MetadataValue(static_cast<int64_t>(x)); };
  return {{"num_layers", integer(s.layers)},
          {"hidden_size", integer(s.hidden_size)},
          {"num_heads", integer(s.heads.heads)},
          {"num_kv_heads", integer(s.heads.kv_heads)},
          {"head_dim", integer(s.heads.head_dim)},
          {"num_experts", integer(config_.num_experts)},
          {"top_k", integer(config_.shape.top_k)},
          {"expert_ffn_size", integer(config_.expert_ffn_size)},
          {"norm_topk_prob", config_.norm_topk_prob},
          {"vocab_size", integer(s.vocab_size)},
          {"context_length", integer(s.context_length)},
          {"rms_eps", static_cast<double>(config_.rms_eps)},
          {"rope_theta", config_.rope.theta},
          {"rope_scaling", config_.rope.scaling},
          {"rotary_dim", integer(s.rotary_dim)},
          {"sliding_window", integer(0)},
          {"tied_embeddings", config_.tied_embeddings}};
}

template <class Place> void Qwen3Moe::visit_weights(Place place) {
  const ModelShape& s = config_.shape;
  const int H = s.hidden_size, F = config_.expert_ffn_size, E = config_.num_experts;
  const int D = s.heads.head_dim, q_size = s.heads.heads * D, kv_size = s.heads.kv_heads * D;
  layers_.resize(static_cast<size_t>(s.layers));
  place(weights_.matrix("token_embd.weight", s.vocab_size, H), token_embedding_);
  place(weights_.vector("output_norm.weight", H), output_norm_);
  if (!config_.tied_embeddings) place(weights_.matrix("output.weight", s.vocab_size, H), output_);
  for (int i = 0; i < s.layers; ++i) {
    Layer& w = layers_[static_cast<size_t>(i)];
    const std::string p = "blk." + std::to_string(i) + ".";
    place(weights_.vector(p + "attn_norm.weight", H), w.attn_norm);
    place(weights_.matrix(p + "attn_q.weight", q_size, H), w.q);
    place(weights_.matrix(p + "attn_k.weight", kv_size, H), w.k);
    place(weights_.matrix(p + "attn_v.weight", kv_size, H), w.v);
    place(weights_.vector(p + "attn_q_norm.weight", D), w.q_norm);
    place(weights_.vector(p + "attn_k_norm.weight", D), w.k_norm);
    place(weights_.matrix(p + "attn_output.weight", H, q_size), w.o);
    place(weights_.vector(p + "ffn_norm.weight", H), w.ffn_norm);
    place(weights_.matrix(p + "ffn_gate_inp.weight", E, H), w.router);
    place(weights_.experts(p + "ffn_gate_exps.weight", E, F, H), w.gate);
    place(weights_.experts(p + "ffn_up_exps.weight", E, F, H), w.up);
    place(weights_.experts(p + "ffn_down_exps.weight", E, H, F), w.down);
  }
}

template <class Visitor> void Qwen3Moe::visit_scratch(const StepLimits& limits, Visitor& visitor) {
  const ModelShape& s = config_.shape;
  const int T = limits.tokens, L = limits.logit_rows, H = s.hidden_size;
  const int q_size = s.heads.heads * s.heads.head_dim, kv_size = s.heads.kv_heads * s.heads.head_dim;
  std::set<WeightType> normed, attended, hidden;
  auto type = [&](const std::string& name) { return weights_.type(name); };
  for (int i = 0; i < s.layers; ++i) {
    const std::string p = "blk." + std::to_string(i) + ".";
    for (const char* name : {"attn_q", "attn_k", "attn_v", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"}) normed.insert(type(p + name + ".weight"));
    attended.insert(type(p + "attn_output.weight"));
    hidden.insert(type(p + "ffn_down_exps.weight"));
  }
  normed.insert(type(config_.tied_embeddings ? "token_embd.weight" : "output.weight"));
  visitor.tensor(scratch_.residual, T, H);
  visitor.tensor(scratch_.delta, T, H);
  visitor.tensor(scratch_.qkv, T, q_size + 2 * kv_size);
  visitor.tensor(scratch_.q, T, q_size);
  visitor.tensor(scratch_.last_residual, L, H);
  visitor.activation(scratch_.normed, T, H, normed);
  visitor.activation(scratch_.attended, T, q_size, attended);
  visitor.activation(scratch_.last_attended, L, q_size, attended);
  visitor.activation(scratch_.expert_hidden, T * config_.shape.top_k, config_.expert_ffn_size, hidden);
  visitor.routing(scratch_.routing, T, config_.shape.top_k, config_.num_experts);
}

namespace {

size_t tensor_bytes(int rows, int cols) { return (static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float) + 255) / 256 * 256; }

struct CountScratch {
  const Backend& backend;
  uint64_t arena = 0, total = 0;
  void tensor(Tensor&, int rows, int cols) { arena += tensor_bytes(rows, cols), total += tensor_bytes(rows, cols); }
  void activation(std::unique_ptr<Activation>&, int rows, int cols, const std::set<WeightType>& consumers) {
    total += backend.activation_bytes(rows, cols, std::vector(consumers.begin(), consumers.end()));
  }
  void routing(std::unique_ptr<Routing>&, int rows, int top_k, int experts) { total += backend.routing_bytes(rows, top_k, experts); }
};

struct TakeScratch {
  Backend& backend;
  Buffer& arena;
  size_t offset = 0;
  void tensor(Tensor& tensor, int rows, int cols) {
    tensor = {&arena, offset, rows, cols};
    offset += tensor_bytes(rows, cols);
  }
  void activation(std::unique_ptr<Activation>& activation, int rows, int cols, const std::set<WeightType>& consumers) {
    activation = backend.make_activation(rows, cols, std::vector(consumers.begin(), consumers.end()));
  }
  void routing(std::unique_ptr<Routing>& routing, int rows, int top_k, int experts) { routing = backend.make_routing(rows, top_k, experts); }
};

}  // namespace

ModelMemory Qwen3Moe::memory(const Backend& backend, const StepLimits& limits) {
  CountScratch count{backend};
  visit_scratch(limits, count);
  uint64_t extra = 0;
  visit_weights([&](const WeightTensor& tensor, std::unique_ptr<Weight>&) { extra += backend.extra_weight_bytes(tensor); });
  return {weights_.bytes(), extra, count.total};
}

void Qwen3Moe::load(Backend& backend, const StepLimits& limits) {
  weights_.map();
  visit_weights([&](const WeightTensor& tensor, std::unique_ptr<Weight>& weight) { weight = backend.place_weight(tensor); });
  CountScratch count{backend};
  visit_scratch(limits, count);
  arena_ = backend.allocate(count.arena);
  TakeScratch take{backend, *arena_};
  visit_scratch(limits, take);
}

void Qwen3Moe::forward(Backend& b, const Batch& batch, Kv& kv, const Tensor& logits) {
  Scratch& a = scratch_;
  b.embed({.table = *token_embedding_, .out = a.residual});
  const Tensor* delta = nullptr;
  Rows rows{a.residual, a.attended.get(), batch.tokens};
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& w = layers_[i];
    const bool last = i + 1 == layers_.size();
    b.norm({.residual = a.residual, .delta = delta, .weight = *w.attn_norm, .eps = config_.rms_eps, .rows = batch.tokens, .out = *a.normed});
    attention_block(b, w, static_cast<int>(i), batch, kv);
    if (last && batch.logit_count() == 0) return;
    rows = rows_after_attention(b, last, batch);
    moe_block(b, w, rows);
    delta = &a.delta;
  }
  b.norm({.residual = rows.residual, .delta = delta, .weight = *output_norm_, .eps = config_.rms_eps, .rows = rows.count, .out = *a.normed});
  const Weight* head[] = {output_ ? output_.get() : token_embedding_.get()};
  b.linear({.name = "head", .x = *a.normed, .rows = rows.count, .weights = head, .out = logits});
}

void Qwen3Moe::attention_block(Backend& b, const Layer& w, int layer, const Batch& batch, Kv& kv) {
  Scratch& a = scratch_;
  const HeadShape& heads = config_.shape.heads;
  const Weight* qkv[] = {w.q.get(), w.k.get(), w.v.get()};
  b.linear({.name = "qkv", .x = *a.normed, .rows = batch.tokens, .weights = qkv, .out = a.qkv});
  b.qk_norm_rope_cache({.qkv = a.qkv, .q_norm = w.q_norm.get(), .k_norm = w.k_norm.get(), .eps = config_.rms_eps, .shape = heads,
                        .rotary_dim = config_.shape.rotary_dim, .layer = layer, .kv = kv, .q_out = a.q});
  if (layer + 1 == config_.shape.layers && batch.logit_count() == 0) return;
  b.attention({.q = a.q, .kv = kv, .layer = layer, .shape = heads, .scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim)), .out = *a.attended});
}

Qwen3Moe::Rows Qwen3Moe::rows_after_attention(Backend& b, bool last, const Batch& batch) {
  Scratch& a = scratch_;
  if (!last || batch.logit_count() == batch.tokens) return {a.residual, a.attended.get(), batch.tokens};
  b.gather_rows(*a.attended, *a.last_attended);
  b.gather_rows(a.residual, a.last_residual);
  return {a.last_residual, a.last_attended.get(), batch.logit_count()};
}

void Qwen3Moe::moe_block(Backend& b, const Layer& w, const Rows& rows) {
  Scratch& a = scratch_;
  const Weight* o[] = {w.o.get()};
  b.linear({.name = "attn_output", .x = *rows.attended, .rows = rows.count, .weights = o, .out = a.delta});
  b.norm({.residual = rows.residual, .delta = &a.delta, .weight = *w.ffn_norm, .eps = config_.rms_eps, .rows = rows.count, .out = *a.normed});
  b.route({.x = *a.normed, .rows = rows.count, .router = *w.router, .top_k = config_.shape.top_k, .normalize = config_.norm_topk_prob, .out = *a.routing});
  b.experts_gate_up({.x = *a.normed, .routing = *a.routing, .gate = *w.gate, .up = *w.up, .out = *a.expert_hidden});
  b.experts_down({.x = *a.expert_hidden, .routing = *a.routing, .down = *w.down, .out = a.delta});
}

}  // namespace ferrum
