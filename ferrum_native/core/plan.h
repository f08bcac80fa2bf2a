// What an engine takes, decided before anything is loaded: the size of the KV pool, and bytes.
#pragma once
#include <cstdint>

#include "../models/model.h"
#include "kv_pool.h"

namespace ferrum {

struct EngineOptions {
  int kv_tokens = 0;              // capacity of the KV pool; 0: min(context length, 8192, what fits the budget or the available memory)
  KvType kv_type = KvType::F16;
  int max_sequences = 16;
  int prefill_chunk = 512;        // prompt tokens of one step
  int max_logit_rows = 0;         // rows of one call's logits; 0: max(max_sequences, 16)
  uint64_t memory_budget = 0;     // bytes that the whole plan must fit; 0: none
  uint64_t available_memory = 0;  // bytes that the system would give, which bound a kv_tokens of 0; 0: unknown
  bool prefix_cache = true;       // whole blocks are found again by their tokens
  bool poison_freed_kv = false;   // tests: blocks whose content is dropped are filled with NaN
};

/// Options as they take effect, and bytes.
struct EnginePlan {
  EngineOptions options;
  int kv_blocks = 0, context = 0;  // context: tokens that one sequence can reach
  uint64_t weights = 0, weights_extra = 0, kv = 0, scratch = 0;
  uint64_t total() const { return weights + weights_extra + kv + scratch; }
};

/// Throws OutOfMemory where the plan does not fit the memory budget: with the kv_tokens that are given, else with min(context length, 512).
EnginePlan make_plan(Model& model, const Backend& backend, const EngineOptions& options);

StepLimits step_limits(const EnginePlan&, const ModelShape&);
KvShape kv_shape(const EnginePlan&, const ModelShape&);
size_t block_table_entries(const EnginePlan&);
uint64_t logits_bytes(const EnginePlan&, const ModelShape&);

}  // namespace ferrum
