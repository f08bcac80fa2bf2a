// The weights of a model file: checked against what the model expects, then mapped read-only, never copied.
#pragma once
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "model_description.h"
#include "tensor.h"

namespace ferrum {

/// A file mapped read-only for its lifetime.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  /// Brings a range into memory and into this process's page tables, instead of at its first use.
  void populate(uint64_t offset, uint64_t bytes) const;
  /// What is read from the disk from now on comes in huge pages: in half the time, and decode, which reads everything, misses the TLB less.
  void advise_huge_pages() const;
  /// Bytes that are in the page cache, as a sample of the file says; all of them where the system does not say.
  double resident_bytes() const;

 private:
  const std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

/// Hands out the tensors of a description, each checked for presence, type and shape; after the model took what it uses,
/// `check_all_used` refuses files with tensors that the model would silently ignore.
class Weights {
 public:
  /// Refuses every tensor type that ferrum does not compute with, by name, count and example. Maps nothing yet.
  explicit Weights(ModelDescription description);
  void map();
  /// The mapped files, one after the other.
  uint64_t mapped_bytes() const;
  void populate(uint64_t offset, uint64_t bytes) const;  // a range of them
  double resident_fraction() const;

  bool has(const std::string& name) const { return description_.tensors.count(name) != 0; }
  WeightTensor matrix(const std::string& name, int rows, int cols) { return take(name, {rows, cols}); }
  WeightTensor experts(const std::string& name, int experts, int rows, int cols) { return take(name, {experts, rows, cols}); }
  WeightTensor vector(const std::string& name, int size);  // F32
  /// Type of a tensor that was handed out.
  WeightType type(const std::string& name) const { return weight_types[weight_type_index(description_.tensors.at(name).type_id)].type; }
  void check_all_used() const;
  uint64_t bytes() const { return bytes_; }  // of all tensors

 private:
  WeightTensor take(const std::string& name, const std::vector<int64_t>& shape);

  const ModelDescription description_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::set<std::string> used_;
  uint64_t bytes_ = 0;
};

}  // namespace ferrum
