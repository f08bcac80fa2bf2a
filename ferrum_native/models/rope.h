// Rotary position embedding: the angles of a family's heads, in double (Su et al. 2021; YaRN: Peng et al. 2023).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../core/model_description.h"

namespace ferrum {

/// Angle of pair i at position p is p * frequencies[i]; cos and sin are multiplied by `magnitude`.
struct Rope {
  std::vector<double> frequencies;  // [rotary_dim / 2]
  double magnitude = 1.0;
  double theta = 0.0;
  std::string scaling;  // "none", "linear 4", "yarn 4 (original context 32768)"

  /// Reads `prefix`.rope.*; scaling "none", "linear" and "yarn" are honoured, any other is refused by name.
  static Rope from(const Metadata& metadata, const std::string& prefix, int rotary_dim);
  /// [count, rotary_dim]: cos of each pair, then sin of each, of every position.
  void cos_sin(const int32_t* positions, int count, float* out) const;
};

}  // namespace ferrum
