// What steps cost, as a profiling backend counts it.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ferrum {

/// What an op moves and computes: `bytes` of weights, keys, values and logits, each as stored and once; activations are not counted.
/// `macs`: multiply-accumulates of its products with matrices, keys and values.
struct OpCost {
  int64_t bytes = 0, macs = 0;
};

struct OpProfile {
  std::string name;
  int64_t calls = 0;
  double seconds = 0;
  OpCost cost;
};

/// Steps of one kind. `seconds` run from `begin` to the end of `finish`: what the ops do not explain was spent around them.
struct PhaseProfile {
  const char* name = "";
  int64_t steps = 0, tokens = 0;
  double seconds = 0;
  std::vector<OpProfile> ops{};  // in the order in which they first ran

  void add(const OpProfile& op);
};

struct Profile {
  enum Phase { Prefill, Decode, BatchedDecode };
  std::array<PhaseProfile, 3> phases{{{"prefill"}, {"decode"}, {"batched decode"}}};
};

}  // namespace ferrum
