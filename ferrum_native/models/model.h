// A model family: its configuration, what it takes, and one forward pass over a ragged batch.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "../core/backend.h"
#include "../core/model_description.h"
#include "../core/weights.h"

namespace ferrum {

/// Name and value of everything a model reads of its file, in the order in which people read it.
using ConfigList = std::vector<std::pair<std::string, MetadataValue>>;

/// What every family has in common, as the engine needs it.
struct ModelShape {
  int layers = 0, hidden_size = 0, vocab_size = 0, context_length = 0, rotary_dim = 0;
  int largest_cols = 0;  // of any matrix
  int top_k = 1;
  HeadShape heads{};
};

struct ModelMemory {
  uint64_t weights = 0, weights_extra = 0, scratch = 0;  // bytes
};

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelShape& shape() const = 0;
  virtual ConfigList config() const = 0;
  /// What `load` would take on a backend for steps within the limits.
  virtual ModelMemory memory(const Backend&, const StepLimits&) = 0;
  /// Maps and places the weights and takes the scratch. Called once, before the first forward.
  virtual void load(Backend&, const StepLimits&) = 0;
  /// Cos and sin of the angles of `count` positions, [count, rotary_dim] as in Batch::rope_cos_sin.
  virtual void rope_cos_sin(const int32_t* positions, int count, float* out) const = 0;
  /// Runs the batch: writes its keys and values, and `logits` [L, vocab] if it wants any.
  virtual void forward(Backend&, const Batch&, Kv&, const Tensor& logits) = 0;
  virtual const Weights& weights() const = 0;
};

/// The model of a description: metadata, tensor types and shapes checked; nothing mapped or allocated.
/// Throws UnsupportedModel or BadModelFile.
std::unique_ptr<Model> make_model(const ModelDescription& description);

}  // namespace ferrum
