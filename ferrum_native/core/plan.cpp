#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <string>

namespace ferrum {
namespace {

constexpr int default_kv_tokens = 8192;
/// Fewest tokens of a pool where nobody said how many, and so what a budget must hold: less is of no use to anybody.
constexpr int least_kv_tokens = 512;

/// "17.28 GiB", "512.0 MiB"
std::string size_text(uint64_t bytes) {
  char text[32];
  const bool large = bytes >= 1u << 30;
  std::snprintf(text, sizeof(text), large ? "%.2f GiB" : "%.1f MiB", static_cast<double>(bytes) / (large ? 1u << 30 : 1u << 20));
  return text;
}

EnginePlan plan_with_blocks(Model& model, const Backend& backend, const EngineOptions& options, int blocks) {
  const ModelShape& shape = model.shape();
  EnginePlan plan;
  plan.options = options;
  EngineOptions& o = plan.options;
  if (o.max_logit_rows == 0) o.max_logit_rows = std::max(o.max_sequences, 16);
  plan.kv_blocks = blocks;
  o.kv_tokens = blocks * kv_block_tokens;
  plan.context = std::min(shape.context_length, o.kv_tokens);
  const ModelMemory memory = model.memory(backend, step_limits(plan, shape));
  plan.weights = memory.weights;
  plan.weights_extra = memory.weights_extra;
  plan.kv = backend.kv_bytes(kv_shape(plan, shape));
  plan.scratch = memory.scratch + logits_bytes(plan, shape) + block_table_entries(plan) * sizeof(int32_t) + backend.scratch_bytes(step_limits(plan, shape));
  return plan;
}

bool fits(const EnginePlan& plan) {
  const EngineOptions& o = plan.options;
  if (o.memory_budget > 0) return plan.total() <= o.memory_budget;
  if (o.available_memory == 0) return true;
  // Weights larger than memory are paged in from their file as they are used, so that only the rest has to fit.
  return plan.total() - (plan.weights > o.available_memory ? plan.weights : 0) <= o.available_memory;
}

[[noreturn]] void refuse(const EnginePlan& plan, int fitting_blocks, bool default_size) {
  std::string text = "the engine would take " + size_text(plan.total()) + ", but memory_budget is " + size_text(plan.options.memory_budget) + ": weights " + size_text(plan.weights);
  if (plan.weights_extra > 0) text += ", copies of weights " + size_text(plan.weights_extra);
  text += ", KV cache " + size_text(plan.kv) + " for kv_tokens=" + std::to_string(plan.options.kv_tokens) + ", scratch " + size_text(plan.scratch) + ". ";
  if (fitting_blocks > 0 && default_size)
    text += "Without kv_tokens at least " + std::to_string(plan.options.kv_tokens) + " must fit; at most " + std::to_string(fitting_blocks * kv_block_tokens) + " would. Give that as kv_tokens, raise memory_budget, or lower prefill_chunk or max_sequences.";
  else if (fitting_blocks > 0)
    text += "At most kv_tokens=" + std::to_string(fitting_blocks * kv_block_tokens) + " would fit. Raise memory_budget, or lower kv_tokens, prefill_chunk or max_sequences.";
  else if (plan.weights + plan.weights_extra < plan.options.memory_budget)
    text += "Not even one block of " + std::to_string(kv_block_tokens) + " tokens would fit. Raise memory_budget, or lower prefill_chunk or max_sequences.";
  else
    text += "Not even the weights fit. Raise memory_budget or choose a smaller model.";
  throw Error(ErrorKind::OutOfMemory, text);
}

}  // namespace

EnginePlan make_plan(Model& model, const Backend& backend, const EngineOptions& options) {
  if (const int D = model.shape().heads.head_dim; options.kv_type == KvType::Q8_0 && D % kv_group != 0)
    throw Error(ErrorKind::UnsupportedModel, "kv_type q8_0 gives each " + std::to_string(kv_group) + " dimensions of a head one scale, and the model's heads have " + std::to_string(D) + ". Choose kv_type f16.");
  const bool given = options.kv_tokens > 0, budget = options.memory_budget > 0;
  auto plan_of = [&](int blocks) { return plan_with_blocks(model, backend, options, blocks); };
  const int wanted = blocks_for(given ? options.kv_tokens : std::min(model.shape().context_length, default_kv_tokens));
  const EnginePlan whole = plan_of(wanted);
  if ((given && !budget) || fits(whole)) return whole;
  int most = 0;  // blocks that fit: a plan grows with its blocks
  for (int above = wanted; above - most > 1;) {
    const int middle = most + (above - most) / 2;
    (fits(plan_of(middle)) ? most : above) = middle;
  }
  const int least = given ? wanted : std::min(wanted, blocks_for(least_kv_tokens));
  if (budget && most < least) refuse(plan_of(least), most, !given);
  return plan_of(std::max(most, least));
}

StepLimits step_limits(const EnginePlan& plan, const ModelShape& shape) {
  const EngineOptions& o = plan.options;
  return {o.prefill_chunk + o.max_sequences, o.max_sequences, o.max_logit_rows, plan.context, shape.heads, shape.largest_cols, shape.top_k};
}

KvShape kv_shape(const EnginePlan& plan, const ModelShape& shape) {
  return {shape.layers, plan.kv_blocks, shape.heads.kv_heads, shape.heads.head_dim, plan.options.kv_type};
}

size_t block_table_entries(const EnginePlan& plan) {
  return static_cast<size_t>(plan.options.max_sequences) * static_cast<size_t>(blocks_for(plan.context));
}

uint64_t logits_bytes(const EnginePlan& plan, const ModelShape& shape) {
  return static_cast<uint64_t>(plan.options.max_logit_rows) * static_cast<uint64_t>(shape.vocab_size) * sizeof(float);
}

}  // namespace ferrum
