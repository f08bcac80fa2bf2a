#include "queue.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <system_error>

#include "metal_compat.h"

using namespace ferrum::fibers;

namespace {

std::mutex settings_mutex;
ferrum::metal_compat::ExecutorOptions executor_options;
int64_t commits = 0, failing_commit = -1;
long failing_code = 0;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

namespace ferrum::metal_compat {

void set_executor_options(const ExecutorOptions& options) {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  executor_options = options;
}
void fail_command_buffer(int64_t number, long code) {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  failing_commit = number < 0 ? -1 : commits + number;
  failing_code = code;
}
int64_t committed_command_buffers() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  return commits;
}

}  // namespace ferrum::metal_compat

struct EncoderArguments {
  CompatBuffer* buffers[msl::MAX_BUFFERS] = {};
  size_t offsets[msl::MAX_BUFFERS] = {};
  std::vector<char> bytes[msl::MAX_BUFFERS];
  size_t threadgroup_bytes[msl::MAX_THREADGROUP_ARGS] = {};
};

@implementation CompatEncoder
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  _pipeline = static_cast<CompatPipeline*>(state);
  if (_pipeline && _buffer->_retains) _buffer->_kept->push_back([_pipeline retain]);
}
- (bool)accepts:(NSUInteger)index {
  if (_ended) [_buffer misuse:"an argument was set after endEncoding"];
  if (index >= msl::MAX_BUFFERS) [_buffer misuse:"buffer index " + std::to_string(index) + " is above 30"];
  return index < msl::MAX_BUFFERS;
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  if (![self accepts:index]) return;
  if (length == 0 || length > 4096) [_buffer misuse:"setBytes takes 1 to 4096 bytes, not " + std::to_string(length)];
  _arguments->buffers[index] = nil;
  _arguments->bytes[index].assign(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + length);
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  if (![self accepts:index]) return;
  _arguments->buffers[index] = static_cast<CompatBuffer*>(buffer);
  _arguments->bytes[index].clear();
  if (buffer && _buffer->_retains) _buffer->_kept->push_back([static_cast<id>(buffer) retain]);
  [self setBufferOffset:offset atIndex:index];
}
- (void)setBufferOffset:(NSUInteger)offset atIndex:(NSUInteger)index {
  if (![self accepts:index]) return;
  const CompatBuffer* buffer = _arguments->buffers[index];
  if (buffer && offset >= buffer->_bytes) [_buffer misuse:"offset " + std::to_string(offset) + " of buffer(" + std::to_string(index) + ") is past its " + std::to_string(buffer->_bytes) + " bytes"];
  _arguments->offsets[index] = offset;
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  if (index >= msl::MAX_THREADGROUP_ARGS) return [_buffer misuse:"threadgroup index " + std::to_string(index) + " is out of range"];
  _arguments->threadgroup_bytes[index] = length;
}
- (void)dispatchThreadgroups:(MTLSize)grid threadsPerThreadgroup:(MTLSize)threads {
  if (_ended) return [_buffer misuse:"a dispatch was encoded after endEncoding"];
  if (!_pipeline) return [_buffer misuse:"a dispatch was encoded without a pipeline"];
  EncodedDispatch encoded;
  Dispatch& dispatch = encoded.dispatch;
  const CompatFunction* function = _pipeline->_function;
  dispatch.kernel = function->_kernel;
  dispatch.instrumented = (*function->_library->_library)->instrumented();
  dispatch.constants = *function->_constants;
  encoded.bytes.resize(msl::MAX_BUFFERS);
  for (uint32_t i = 0; i < msl::MAX_BUFFERS; ++i) {
    const CompatBuffer* buffer = _arguments->buffers[i];
    if (buffer && _arguments->offsets[i] < buffer->_bytes) dispatch.buffers[i] = {buffer->_data + _arguments->offsets[i], buffer->_bytes - _arguments->offsets[i]};
    if (_arguments->bytes[i].empty()) continue;
    encoded.bytes[i] = _arguments->bytes[i];
    dispatch.buffers[i] = {encoded.bytes[i].data(), encoded.bytes[i].size()};
  }
  std::memcpy(dispatch.threadgroup_bytes, _arguments->threadgroup_bytes, sizeof dispatch.threadgroup_bytes);
  const NSUInteger sizes[6] = {grid.width, grid.height, grid.depth, threads.width, threads.height, threads.depth};
  for (int k = 0; k < 3; ++k) {
    dispatch.grid[k] = static_cast<uint32_t>(sizes[k]);
    dispatch.threads[k] = static_cast<uint32_t>(sizes[k + 3]);
  }
  const std::string why = refused(dispatch);
  if (!why.empty()) [_buffer misuse:why];
  _buffer->_dispatches->push_back(std::move(encoded));
}
- (void)endEncoding {
  if (_ended) [_buffer misuse:"endEncoding was called twice"];
  _ended = true;
  _buffer->_encoding = false;
}
- (void)dealloc {
  if (!_ended) [_buffer misuse:"an encoder was released before endEncoding"];
  delete _arguments;
  [_buffer release];
  [super dealloc];
}
@end

@implementation CompatCommandBuffer
- (instancetype)initWithDevice:(id<MTLDevice>)device {
  if (!(self = [super initWithDevice:device])) return nil;
  _dispatches = new std::vector<EncodedDispatch>;
  _kept = new std::vector<id>;
  _handlers = new std::vector<MTLCommandBufferHandler>;
  _misuse = new std::string;
  _mutex = new std::mutex;
  _changed = new std::condition_variable;
  return self;
}
- (void)dealloc {
  for (id object : *_kept) [object release];
  for (MTLCommandBufferHandler handler : *_handlers) _Block_release(reinterpret_cast<const void*>(handler));
  delete _dispatches;
  delete _kept;
  delete _handlers;
  delete _misuse;
  delete _mutex;
  delete _changed;
  [_error release];
  [_queue release];
  [super dealloc];
}
- (id<MTLCommandQueue>)commandQueue { return _queue; }
- (void)misuse:(const std::string&)what {
  if (_misuse->empty()) *_misuse = what;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder { return [self computeCommandEncoderWithDispatchType:MTLDispatchTypeSerial]; }
- (id<MTLComputeCommandEncoder>)computeCommandEncoderWithDispatchType:(MTLDispatchType)dispatchType {
  if (dispatchType != MTLDispatchTypeSerial) [self misuse:"only serial encoders are modelled: hazards between concurrent dispatches would go unseen"];
  if (_encoding) [self misuse:"an encoder was made while another one encodes"];
  if ([self status] >= MTLCommandBufferStatusCommitted) [self misuse:"an encoder was made after commit"];
  CompatEncoder* encoder = [[[CompatEncoder alloc] initWithDevice:[self device]] autorelease];
  encoder->_buffer = [self retain];
  encoder->_arguments = new EncoderArguments;
  _encoding = true;
  return encoder;
}
- (void)addCompletedHandler:(MTLCommandBufferHandler)block {
  if ([self status] >= MTLCommandBufferStatusCommitted) [self misuse:"a completion handler was added after commit"];
  _handlers->push_back(reinterpret_cast<MTLCommandBufferHandler>(_Block_copy(reinterpret_cast<const void*>(block))));
}
- (MTLCommandBufferStatus)status {
  const std::lock_guard<std::mutex> lock(*_mutex);
  return _status;
}
- (void)setStatus:(MTLCommandBufferStatus)status {
  const std::lock_guard<std::mutex> lock(*_mutex);
  _status = status;
  _changed->notify_all();
}
- (NSError*)error { return [self status] == MTLCommandBufferStatusError ? _error : nil; }
- (CFTimeInterval)GPUStartTime { return _start; }
- (CFTimeInterval)GPUEndTime { return _end; }
- (void)commit {
  if (_encoding) [self misuse:"commit before endEncoding"];
  if ([self status] >= MTLCommandBufferStatusCommitted) return [self misuse:"commit was called twice"];
  {
    const std::lock_guard<std::mutex> lock(settings_mutex);
    if (commits++ == failing_commit) {
      _injected = failing_code;
      failing_commit = -1;
    }
  }
  [self setStatus:MTLCommandBufferStatusCommitted];
  QueueState& state = **_queue->_state;
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.committed.push_back([self retain]);
  state.changed.notify_all();
}
- (void)waitUntilCompleted {
  std::unique_lock<std::mutex> lock(*_mutex);
  if (_status < MTLCommandBufferStatusCommitted) return;  // Metal would wait for ever
  _changed->wait(lock, [self] { return _finished; });
}
- (void)run {
  [self setStatus:MTLCommandBufferStatusScheduled];
  _start = seconds();
  Options options;
  {
    const std::lock_guard<std::mutex> lock(settings_mutex);
    options = {executor_options.seed, executor_options.threads};
  }
  std::string fault = _misuse->empty() ? "" : "wrong use of Metal: " + *_misuse;
  NSInteger code = fault.empty() ? MTLCommandBufferErrorPageFault : MTLCommandBufferErrorInvalidResource;
  const size_t count = _injected ? _dispatches->size() / 2 : _dispatches->size();
  try {
    for (size_t i = 0; i < count && fault.empty(); ++i) fault = ferrum::fibers::run((*_dispatches)[i].dispatch, options);
  } catch (const std::exception& failure) {  // no thread, no memory
    fault = failure.what();
    code = MTLCommandBufferErrorInternal;
  }
  if (_injected && fault.empty()) {
    code = _injected;
    fault = "a failure that was asked for (code " + std::to_string(_injected) + ")";
  }
  if (!fault.empty()) _error = [compat_error(MTLCommandBufferErrorDomain, code, fault) retain];
  _end = seconds();
  // Handlers see the final status; waits end after them.
  [self setStatus:_error ? MTLCommandBufferStatusError : MTLCommandBufferStatusCompleted];
  for (MTLCommandBufferHandler handler : *_handlers) handler(self);
  const std::lock_guard<std::mutex> lock(*_mutex);
  _finished = true;
  _changed->notify_all();
}
@end

void QueueState::work() {
  for (std::unique_lock<std::mutex> lock(mutex);;) {
    changed.wait(lock, [this] { return stopped || !committed.empty(); });
    if (committed.empty()) return;
    CompatCommandBuffer* buffer = committed.front();
    committed.pop_front();
    lock.unlock();
    NSAutoreleasePool* pool = [NSAutoreleasePool new];
    [buffer run];
    [pool drain];
    [buffer release];  // may release the queue, and with it ask this thread to end
    lock.lock();
  }
}

@implementation CompatQueue
- (instancetype)initWithDevice:(id<MTLDevice>)device {
  if (!(self = [super initWithDevice:device])) return nil;
  auto state = std::make_shared<QueueState>();
  _state = new std::shared_ptr<QueueState>(state);
  try {
    _thread = new std::thread([state] { state->work(); });
  } catch (const std::system_error&) {  // no more threads
    [self release];
    return nil;
  }
  return self;
}
- (id<MTLCommandBuffer>)commandBuffer { return [self commandBufferThatRetains:true]; }
- (id<MTLCommandBuffer>)commandBufferWithUnretainedReferences { return [self commandBufferThatRetains:false]; }
- (CompatCommandBuffer*)commandBufferThatRetains:(bool)retains {
  CompatCommandBuffer* buffer = [[[CompatCommandBuffer alloc] initWithDevice:[self device]] autorelease];
  buffer->_queue = [self retain];
  buffer->_retains = retains;
  return buffer;
}
- (void)dealloc {
  {
    const std::lock_guard<std::mutex> lock((*_state)->mutex);
    (*_state)->stopped = true;
    (*_state)->changed.notify_all();
  }
  if (_thread && _thread->get_id() == std::this_thread::get_id()) _thread->detach();
  else if (_thread) _thread->join();
  delete _thread;
  delete _state;
  [super dealloc];
}
@end
