// Host memory of the CPU backend: zeroed pages that count as resident only once they are touched.
#pragma once
#include <cstddef>

#include "../core/tensor.h"

namespace ferrum::cpu {

class CpuBuffer final : public Buffer {
 public:
  explicit CpuBuffer(size_t bytes);  // page-aligned, zeroed; throws Error(OutOfMemory)
  ~CpuBuffer() override;
};

/// Typed pieces of one CpuBuffer; each starts at a 64-byte boundary.
class Arena {
 public:
  /// Bytes that a piece takes.
  static size_t bytes_for(size_t count, size_t size) { return (count * size + 63) / 64 * 64; }
  explicit Arena(size_t bytes) : buffer_(bytes) {}
  template <class T> T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(buffer_.host() + used_);
    used_ += bytes_for(count, sizeof(T));
    return piece;
  }

 private:
  CpuBuffer buffer_;
  size_t used_ = 0;
};

inline float* data(const Tensor& tensor) { return reinterpret_cast<float*>(tensor.buffer->host() + tensor.offset); }
inline float* row(const Tensor& tensor, int index) { return data(tensor) + static_cast<size_t>(index) * static_cast<size_t>(tensor.cols); }

}  // namespace ferrum::cpu
