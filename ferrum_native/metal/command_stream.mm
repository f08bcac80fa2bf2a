#include "command_stream.h"

namespace ferrum::metal {
namespace {

constexpr const char* lost_text = "the Metal device was lost, and this engine with it. Make a new Engine.";

/// After these errors every later command buffer of the device fails too.
bool loses_device(NSInteger code) {
  return code == MTLCommandBufferErrorAccessRevoked || code == MTLCommandBufferErrorNotPermitted || code == MTLCommandBufferErrorDeviceRemoved;
}

[[noreturn]] void throw_failure(NSError* error) {
  const NSInteger code = error ? [error code] : 0;
  if (code == MTLCommandBufferErrorOutOfMemory)
    throw Error(ErrorKind::OutOfMemory, "the Metal device ran out of memory during a step: " + reason(error) +
                                            ".\nNothing advanced. Free memory, or make an Engine with a lower kv_tokens or prefill_chunk.");
  if (code == MTLCommandBufferErrorTimeout)
    throw Error(ErrorKind::Device, "a step took longer than the Metal device allows: " + reason(error) + ".\nNothing advanced. Lower prefill_chunk.");
  if (loses_device(code)) throw Error(ErrorKind::Device, reason(error) + ": " + lost_text);
  throw Error(ErrorKind::Device, "a step failed on the Metal device: " + reason(error) + ".\nNothing advanced; the engine can be used again.");
}

}  // namespace

void CommandStream::open() {
  if (lost_) throw Error(ErrorKind::Device, lost_text);
  buffer_ = Owned<id<MTLCommandBuffer>>::retained([device_.queue() commandBuffer]);
  if (buffer_) encoder_ = Owned<id<MTLComputeCommandEncoder>>::retained([buffer_.get() computeCommandEncoder]);
  if (!encoder_) throw Error(ErrorKind::Device, "the Metal device gave no command buffer.");
}

void CommandStream::encode(const Dispatch& d) {
  if (d.groups.x == 0 || d.groups.y == 0 || d.groups.z == 0) return;
  if (d.threads > d.pipeline.most_threads)
    throw Error(ErrorKind::Device, "this Metal device runs a kernel with " + std::to_string(d.pipeline.most_threads) +
                                       " threads at once that needs " + std::to_string(d.threads) + ". Choose device=\"cpu\".");
  AutoreleaseScope scope;
  if (!encoder_) open();
  id<MTLComputeCommandEncoder> encoder = encoder_.get();
  [encoder setComputePipelineState:d.pipeline.state.get()];
  [encoder setBytes:d.args.data() length:d.args.size() atIndex:0];
  for (size_t i = 0; i < d.buffers.size(); ++i) [encoder setBuffer:d.buffers[i].buffer offset:d.buffers[i].offset atIndex:i + 1];
  if (d.threadgroup_bytes > 0) [encoder setThreadgroupMemoryLength:d.threadgroup_bytes atIndex:0];
  [encoder dispatchThreadgroups:MTLSizeMake(d.groups.x, d.groups.y, d.groups.z) threadsPerThreadgroup:MTLSizeMake(d.threads, 1, 1)];
  ++counters_.dispatches;
}

void CommandStream::run() {
  if (!encoder_) return;
  AutoreleaseScope scope;
  [encoder_.get() endEncoding];
  encoder_ = {};
  const Owned<id<MTLCommandBuffer>> buffer = std::move(buffer_);
  ++counters_.command_buffers;
  [buffer.get() commit];
  [buffer.get() waitUntilCompleted];
  if ([buffer.get() status] == MTLCommandBufferStatusCompleted) return;
  NSError* error = [buffer.get() error];
  lost_ = error && loses_device([error code]);
  throw_failure(error);
}

void CommandStream::abandon() noexcept {
  if (encoder_) [encoder_.get() endEncoding];
  encoder_ = {};
  buffer_ = {};
}

}  // namespace ferrum::metal
