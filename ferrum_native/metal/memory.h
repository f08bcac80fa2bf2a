// What the Metal backend keeps in device memory, and the places of it that kernels take. Host and device see all of it alike.
#pragma once
#include "../../metal_src/shared/expert_tiles.h"
#include "../../metal_src/shared/kv_layout.h"
#include "../core/backend.h"
#include "device.h"

namespace ferrum::metal {

/// Offsets of the pieces of one buffer, each at a multiple of 256 bytes.
class Layout {
 public:
  size_t piece(size_t bytes) {
    const size_t at = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

/// A weight in place: a buffer over the pages of the mapping that hold it.
struct MetalWeight final : Weight {
  MetalWeight(const WeightTensor& t, Owned<id<MTLBuffer>> b, size_t o) : Weight(t), buffer(std::move(b)), offset(o) {}
  const Owned<id<MTLBuffer>> buffer;
  const size_t offset;
};

/// Float rows; every consumer takes them as they are.
struct MetalActivation final : Activation {
  MetalActivation(const Device& device, int r, int c) : Activation(r, c), buffer(device.allocate(bytes(r, c))) {}
  static size_t bytes(int rows, int cols) { return static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float); }
  float* values() const { return reinterpret_cast<float*>(buffer->host()); }
  const std::unique_ptr<MetalBuffer> buffer;
};

struct RoutingLayout {
  RoutingLayout(int rows, int top_k, int experts);
  size_t ids, weights, start, pairs, tiles, tile_count, bytes;
};

/// Choices of `rows` rows (the last `route` says how many) and their grouping.
struct MetalRouting final : Routing {
  MetalRouting(const Device& device, int rows, int k, int e) : top_k(k), experts(e), layout(rows, k, e), buffer(device.allocate(layout.bytes)) {}
  int pairs() const { return rows * top_k; }
  size_t most_tiles() const { return static_cast<size_t>(shared::most_expert_tiles(pairs(), experts)); }
  Place place(size_t offset) const { return {buffer->get(), offset}; }
  template <class T> const T* host(size_t offset) const { return reinterpret_cast<const T*>(buffer->host() + offset); }

  const int top_k, experts;
  const RoutingLayout layout;
  const std::unique_ptr<MetalBuffer> buffer;
  int rows = 0;
};

/// Keys and values of all layers, laid out as kv_layout.h says.
struct MetalKv final : Kv {
  MetalKv(const Device& device, const KvShape& s) : shape(s), keys(device.allocate(bytes(s))), values(device.allocate(bytes(s))) {}
  /// Of the keys, and of the values.
  static size_t bytes(const KvShape& s) { return static_cast<size_t>(s.layers) * static_cast<size_t>(s.blocks) * block_bytes(s); }
  /// Of one block of one layer.
  static size_t block_bytes(const KvShape& s) { return static_cast<size_t>(s.heads) * shared::kv_block_elements(s.head_dim) * (s.type == KvType::F16 ? 2 : 4); }
  const KvShape shape;
  const std::unique_ptr<MetalBuffer> keys, values;
};

/// Room for what calls outside of steps bring or get: grows where a call needs more than any before.
class Room {
 public:
  explicit Room(const Device& device) : device_(device) {}
  void reserve(size_t bytes) {
    if (!buffer_ || buffer_->bytes() < bytes) buffer_ = device_.allocate(bytes);
  }
  Place place(size_t offset = 0) const { return {buffer_->get(), offset}; }
  template <class T> T* host(size_t offset = 0) const { return reinterpret_cast<T*>(buffer_->host() + offset); }

 private:
  const Device& device_;
  std::unique_ptr<MetalBuffer> buffer_;
};

inline Place place(const Tensor& tensor) { return {static_cast<const MetalBuffer*>(tensor.buffer)->get(), tensor.offset}; }
inline Place place(const Weight& weight) {
  const MetalWeight& placed = static_cast<const MetalWeight&>(weight);
  return {placed.buffer.get(), placed.offset};
}
inline Place place(const Activation& x) { return {static_cast<const MetalActivation&>(x).buffer->get(), 0}; }
inline Place place(const std::unique_ptr<MetalBuffer>& buffer) { return {buffer->get(), 0}; }

}  // namespace ferrum::metal
