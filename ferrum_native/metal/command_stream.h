// What ops encode: one command buffer with one serial encoder from the first dispatch to the wait.
#pragma once
#include <span>

#include "device.h"

namespace ferrum::metal {

struct Groups { size_t x = 1, y = 1, z = 1; };

/// One kernel over a grid of threadgroups; its arguments are at buffer index 0, its buffers from index 1 on.
struct Dispatch {
  const Pipeline& pipeline;
  std::span<const std::byte> args;
  std::span<const Place> buffers;
  Groups groups;
  size_t threads;                // of a threadgroup
  size_t threadgroup_bytes = 0;  // a multiple of 16
};

/// A dispatch runs after all before it have ended, as the encoder is serial.
class CommandStream {
 public:
  CommandStream(const Device& device, DeviceCounters& counters) : device_(device), counters_(counters) {}
  ~CommandStream() { abandon(); }
  CommandStream(const CommandStream&) = delete;
  CommandStream& operator=(const CommandStream&) = delete;

  void encode(const Dispatch&);
  /// Runs what was encoded and waits for it; the only wait. Throws Error(Device) or Error(OutOfMemory); what was encoded is gone either way.
  void run();
  /// Drops what was encoded and not run.
  void abandon() noexcept;
  bool empty() const { return !encoder_; }

 private:
  void open();

  const Device& device_;
  DeviceCounters& counters_;
  Owned<id<MTLCommandBuffer>> buffer_;
  Owned<id<MTLComputeCommandEncoder>> encoder_;
  bool lost_ = false;
};

}  // namespace ferrum::metal
