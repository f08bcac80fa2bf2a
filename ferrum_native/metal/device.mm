#include "device.h"

namespace ferrum::metal {
namespace {

Owned<id<MTLLibrary>> open_library(id<MTLDevice> device, const KernelSource& source) {
  NSError* error = nil;
  Owned<MTLCompileOptions*> options([MTLCompileOptions new]);
  [options.get() setFastMathEnabled:NO];  // kernels tell NaN and infinities apart from numbers
  Owned<id<MTLLibrary>> library(source.library_path.empty() ? [device newLibraryWithSource:to_ns(source.text) options:options.get() error:&error]
                                                            : [device newLibraryWithURL:[NSURL fileURLWithPath:to_ns(source.library_path)] error:&error]);
  if (!library) throw Error(ErrorKind::Device, "Metal could not load ferrum's kernels: " + reason(error) + ".\nReinstall ferrum; with device=\"cpu\" it runs without them.");
  return library;
}

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

Device::Device(const KernelSource& source, DeviceCounters& counters) : source_(source), counters_(counters) {
  AutoreleaseScope scope;
  device_ = Owned<id<MTLDevice>>(MTLCreateSystemDefaultDevice());
  if (!device_) throw Error(ErrorKind::Device, "this machine has no Metal device. Choose device=\"cpu\".");
  queue_ = Owned<id<MTLCommandQueue>>([device_.get() newCommandQueue]);
  if (!queue_) throw Error(ErrorKind::Device, "the Metal device gave no command queue. Choose device=\"cpu\".");
}

std::string Device::name() const {
  AutoreleaseScope scope;
  return to_text([device_.get() name]);
}

void Device::check_length(size_t bytes) const {
  const size_t most = [device_.get() maxBufferLength];
  if (bytes <= most) return;
  throw Error(ErrorKind::OutOfMemory, "a buffer of " + mebibytes(bytes) + " is beyond the " + mebibytes(most) +
                                          " that the Metal device takes in one piece. Lower kv_tokens, max_sequences or prefill_chunk.");
}

std::unique_ptr<MetalBuffer> Device::allocate(size_t bytes) const {
  AutoreleaseScope scope;
  const size_t length = std::max<size_t>(bytes, 16);
  check_length(length);
  Owned<id<MTLBuffer>> buffer([device_.get() newBufferWithLength:length options:MTLResourceStorageModeShared]);
  if (!buffer) throw Error(ErrorKind::OutOfMemory, "the Metal device refused " + mebibytes(bytes) + " of memory. Lower kv_tokens, max_sequences or prefill_chunk.");
  return std::make_unique<MetalBuffer>(std::move(buffer), bytes);
}

Owned<id<MTLBuffer>> Device::wrap(const std::byte* pages, size_t bytes) const {
  AutoreleaseScope scope;
  check_length(bytes);
  Owned<id<MTLBuffer>> buffer([device_.get() newBufferWithBytesNoCopy:const_cast<std::byte*>(pages) length:bytes options:MTLResourceStorageModeShared deallocator:nil]);
  if (!buffer) throw Error(ErrorKind::OutOfMemory, "the Metal device could not map " + mebibytes(bytes) + " of the model's weights. Free memory or choose a smaller model.");
  return buffer;
}

void Device::load_kernels() {
  AutoreleaseScope scope;
  if (!library_) library_ = open_library(device_.get(), source_);
}

const Pipeline& Device::pipeline(const Kernel& kernel) {
  const auto known = pipelines_.find(kernel);
  return known != pipelines_.end() ? known->second : pipelines_.emplace(kernel, specialise(kernel)).first->second;
}

Pipeline Device::specialise(const Kernel& kernel) {
  load_kernels();
  AutoreleaseScope scope;
  const std::string name(kernel.name);
  Owned<MTLFunctionConstantValues*> values([MTLFunctionConstantValues new]);
  for (size_t i = 0; i < kernel.count; ++i) [values.get() setConstantValue:&kernel.constants[i].value type:MTLDataTypeInt atIndex:kernel.constants[i].index];
  NSError* error = nil;
  Owned<id<MTLFunction>> function([library_.get() newFunctionWithName:to_ns(name) constantValues:values.get() error:&error]);
  if (!function) throw Error(ErrorKind::Device, "Metal kernel " + name + " could not be specialised: " + reason(error) + ".");
  Owned<id<MTLComputePipelineState>> state([device_.get() newComputePipelineStateWithFunction:function.get() error:&error]);
  if (!state) throw Error(ErrorKind::Device, "Metal kernel " + name + " could not be compiled for this device: " + reason(error) + ".");
  ++counters_.pipelines;
  const size_t most_threads = [state.get() maxTotalThreadsPerThreadgroup];
  return {std::move(state), most_threads};
}

}  // namespace ferrum::metal
