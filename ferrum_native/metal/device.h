// The Metal device: its queue, its kernels as pipelines, and its memory.
#pragma once
#include <cmath>  // Apple's headers use INFINITY

#import <Metal/Metal.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <tuple>

#include "metal.h"
#include "objc.h"

namespace ferrum::metal {

/// Value of a function constant; all of ours are 32-bit integers.
struct Constant {
  unsigned index = 0;
  int32_t value = 0;
  bool operator<(const Constant& other) const { return std::tie(index, value) < std::tie(other.index, other.value); }
};

/// A kernel by name, specialised by constants.
struct Kernel {
  static constexpr size_t most_constants = 4;
  Kernel(std::string_view n, std::initializer_list<Constant> given = {}) : name(n), count(given.size()) { std::copy(given.begin(), given.end(), constants.begin()); }
  bool operator<(const Kernel& other) const { return std::tie(name, constants) < std::tie(other.name, other.constants); }
  std::string_view name;  // of a literal
  std::array<Constant, most_constants> constants{};
  size_t count;
};
struct Pipeline {
  Owned<id<MTLComputePipelineState>> state;
  size_t most_threads;  // of a threadgroup
};

/// Memory that host and device see alike.
class MetalBuffer final : public Buffer {
 public:
  MetalBuffer(Owned<id<MTLBuffer>> buffer, size_t bytes) : Buffer(static_cast<std::byte*>([buffer.get() contents]), bytes), buffer_(std::move(buffer)) {}
  id<MTLBuffer> get() const { return buffer_.get(); }

 private:
  Owned<id<MTLBuffer>> buffer_;
};

/// A place in a buffer, as a kernel's argument.
struct Place {
  id<MTLBuffer> buffer = nil;
  size_t offset = 0;  // bytes
};

class Device {
 public:
  Device(const KernelSource& source, DeviceCounters& counters);  // throws Error(Device)

  std::string name() const;
  id<MTLCommandQueue> queue() const { return queue_.get(); }

  /// Zeroed; throws Error(OutOfMemory).
  std::unique_ptr<MetalBuffer> allocate(size_t bytes) const;
  /// A buffer over whole pages of memory that stays where it is; it copies nothing. Throws Error(OutOfMemory).
  Owned<id<MTLBuffer>> wrap(const std::byte* pages, size_t bytes) const;

  /// Compiles or opens the kernels, if that was not done: not in the constructor, as a plan needs none. Throws Error(Device).
  void load_kernels();
  /// Specialised at the first call, kept for the device's lifetime. Throws Error(Device).
  const Pipeline& pipeline(const Kernel& kernel);

 private:
  void check_length(size_t bytes) const;
  Pipeline specialise(const Kernel& kernel);

  const KernelSource source_;
  DeviceCounters& counters_;
  Owned<id<MTLDevice>> device_;
  Owned<id<MTLCommandQueue>> queue_;
  Owned<id<MTLLibrary>> library_;
  std::map<Kernel, Pipeline> pipelines_;
};

}  // namespace ferrum::metal
