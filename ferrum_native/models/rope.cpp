#include "rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <sstream>

#include "../core/error.h"

namespace ferrum {
namespace {

/// Pair whose wave turns `rotations` times over the original context.
double yarn_pair(double rotations, int rotary_dim, double theta, double original_context) {
  return rotary_dim * std::log(original_context / (rotations * 2.0 * std::numbers::pi)) / (2.0 * std::log(theta));
}

/// Blends interpolated (slow pairs) and original (fast pairs) frequencies over the ramp between beta_fast and beta_slow.
void apply_yarn(Rope& rope, const Metadata& metadata, const std::string& prefix, int rotary_dim, double factor, int original_context) {
  double fast = metadata.real(prefix + "yarn_beta_fast", 32.0), slow = metadata.real(prefix + "yarn_beta_slow", 1.0);
  if (!(fast > 0 && slow > 0)) throw Error(ErrorKind::BadModelFile, "metadata keys " + prefix + "yarn_beta_fast and yarn_beta_slow are not both above 0. Convert the model again.");
  double low = std::max(0.0, std::floor(yarn_pair(fast, rotary_dim, rope.theta, original_context)));
  double high = std::min(rotary_dim - 1.0, std::ceil(yarn_pair(slow, rotary_dim, rope.theta, original_context)));
  if (high <= low) high = low + 0.001;
  for (size_t i = 0; i < rope.frequencies.size(); ++i) {
    double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    rope.frequencies[i] = rope.frequencies[i] / factor * ramp + rope.frequencies[i] * (1.0 - ramp);
  }
  rope.magnitude = metadata.real(prefix + "attn_factor", 1.0) * (factor > 1.0 ? 0.1 * std::log(factor) + 1.0 : 1.0);
}

}  // namespace

Rope Rope::from(const Metadata& metadata, const std::string& architecture, int rotary_dim) {
  Rope rope;
  rope.theta = metadata.real(architecture + ".rope.freq_base", 10000.0);
  if (!(rope.theta > 1.0)) throw Error(ErrorKind::BadModelFile, "metadata key " + architecture + ".rope.freq_base is not above 1. The file is damaged; convert the model again.");
  for (int i = 0; i < rotary_dim / 2; ++i) rope.frequencies.push_back(std::pow(rope.theta, -2.0 * i / rotary_dim));

  const std::string prefix = architecture + ".rope.scaling.";
  for (const char* key : {"alpha", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"})
    if (metadata.has(prefix + key)) throw Error(ErrorKind::UnsupportedModel, "the file sets " + prefix + key + ", a variant of RoPE scaling that ferrum does not compute.");
  const std::string type = metadata.text(prefix + "type", "none");
  if (type == "none") {
    rope.scaling = type;
    return rope;
  }
  if (type != "linear" && type != "yarn")
    throw Error(ErrorKind::UnsupportedModel, "the file's RoPE scaling is " + type + "; ferrum computes none, linear and yarn.");
  double factor = metadata.real(prefix + "factor");
  if (!(factor >= 1.0) || !std::isfinite(factor)) throw Error(ErrorKind::BadModelFile, "metadata key " + prefix + "factor is not a number of at least 1. Convert the model again.");
  std::ostringstream text;
  text << type << " " << factor;
  if (type == "linear") {
    for (double& frequency : rope.frequencies) frequency /= factor;
  } else {
    int original = metadata.integer(prefix + "original_context_length");
    if (original < 1) throw Error(ErrorKind::BadModelFile, "metadata key " + prefix + "original_context_length is 0. Convert the model again.");
    apply_yarn(rope, metadata, prefix, rotary_dim, factor, original);
    text << " (original context " << original << ")";
  }
  rope.scaling = text.str();
  return rope;
}

void Rope::cos_sin(const int32_t* positions, int count, float* out) const {
  const size_t pairs = frequencies.size();
  for (int t = 0; t < count; ++t, out += 2 * pairs) {
    for (size_t i = 0; i < pairs; ++i) {
      double angle = positions[t] * frequencies[i];
      out[i] = static_cast<float>(magnitude * std::cos(angle));
      out[pairs + i] = static_cast<float>(magnitude * std::sin(angle));
    }
  }
}

}  // namespace ferrum
