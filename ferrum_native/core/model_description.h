// What a model file says about itself, as the Python reader parsed it: scalar metadata and the table of tensors.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace ferrum {

/// monostate: a value of a kind that no model reads, such as an array.
using MetadataValue = std::variant<std::monostate, bool, int64_t, double, std::string>;

/// Scalar metadata by key. A key of another kind than asked for, or out of range, is an Error that names the key.
class Metadata {
 public:
  void set(const std::string& key, MetadataValue value) { values_[key] = std::move(value); }
  bool has(const std::string& key) const { return values_.count(key) != 0; }
  int integer(const std::string& key) const;  // 0 .. 2^31 - 1; required
  int integer(const std::string& key, int otherwise) const;
  double real(const std::string& key) const;  // finite
  double real(const std::string& key, double otherwise) const;
  bool boolean(const std::string& key, bool otherwise) const;
  std::string text(const std::string& key, const std::string& otherwise) const;

 private:
  const MetadataValue& required(const std::string& key) const;
  std::map<std::string, MetadataValue> values_;
};

struct TensorEntry {
  std::string name;
  int type_id = 0;
  std::string type_name;
  std::vector<int64_t> shape;  // slowest first
  int file = 0;
  uint64_t offset = 0, bytes = 0;  // in that file
};

struct ModelDescription {
  std::string architecture;
  Metadata metadata;
  std::vector<std::string> paths;
  std::map<std::string, TensorEntry> tensors;
};

}  // namespace ferrum
