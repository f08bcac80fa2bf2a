// Memory and the views of it that ops take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "quant_types.h"

namespace ferrum {

/// Memory that a backend owns; `host` is null where the host cannot see it.
class Buffer {
 public:
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::byte* host() const { return host_; }
  size_t bytes() const { return bytes_; }

 protected:
  Buffer(std::byte* host, size_t bytes) : host_(host), bytes_(bytes) {}
  std::byte* host_;
  size_t bytes_;
};

/// View of float values [rows, cols], row-major and dense, inside a buffer of a backend.
struct Tensor {
  Buffer* buffer = nullptr;
  size_t offset = 0;  // bytes
  int rows = 0, cols = 0;
};

/// A weight [experts, rows, cols] as the file holds it: `experts` is 1 but for expert stacks; each row is cols / block blocks.
struct WeightTensor {
  WeightType type = WeightType::F32;
  int experts = 1;
  int rows = 0, cols = 0;
  const std::byte* data = nullptr;  // in the mapping

  size_t row_bytes() const { return ferrum::row_bytes(type, cols); }
  size_t bytes() const { return row_bytes() * static_cast<size_t>(rows) * static_cast<size_t>(experts); }
};

/// A weight where the backend has placed it; made by Backend::place_weight.
class Weight {
 public:
  virtual ~Weight() = default;
  const WeightTensor tensor;

 protected:
  explicit Weight(const WeightTensor& t) : tensor(t) {}
};

/// Activation rows [rows, cols]: float values and the packed forms that their consumers want; made by Backend::make_activation.
class Activation {
 public:
  virtual ~Activation() = default;
  const int rows, cols;

 protected:
  Activation(int r, int c) : rows(r), cols(c) {}
};

/// The (token, expert) pairs of a step, grouped by expert, with their weights; made by Backend::make_routing.
class Routing {
 public:
  virtual ~Routing() = default;
};

/// The paged keys and values of all layers; made by Backend::make_kv.
class Kv {
 public:
  virtual ~Kv() = default;
};

}  // namespace ferrum
