// Command queues, command buffers and encoders of the stand-in.
#pragma once
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "device.h"

@class CompatCommandBuffer;

/// What a queue and its thread share. The thread runs command buffers in the order of their commits.
struct QueueState {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<CompatCommandBuffer*> committed;  // each holds one reference
  bool stopped = false;
  void work();
};

@interface CompatQueue : CompatObject <MTLCommandQueue> {
 @public
  std::shared_ptr<QueueState>* _state;
  std::thread* _thread;
}
@end

/// A dispatch and what keeps its arguments alive.
struct EncodedDispatch {
  ferrum::fibers::Dispatch dispatch;
  std::vector<std::vector<char>> bytes;
};

@interface CompatCommandBuffer : CompatObject <MTLCommandBuffer> {
 @public
  CompatQueue* _queue;
  std::vector<EncodedDispatch>* _dispatches;
  std::vector<id>* _kept;                        // pipelines and buffers, unless it was made with unretained references
  std::vector<MTLCommandBufferHandler>* _handlers;
  std::string* _misuse;                          // what Metal's validation would stop at
  std::mutex* _mutex;
  std::condition_variable* _changed;
  MTLCommandBufferStatus _status;
  NSError* _error;
  NSInteger _injected;                           // error code, or 0
  bool _retains, _encoding, _finished;           // finished: the handlers ran
  double _start, _end;
}
- (void)run;
- (void)misuse:(const std::string&)what;
@end

@interface CompatEncoder : CompatObject <MTLComputeCommandEncoder> {
 @public
  CompatCommandBuffer* _buffer;
  CompatPipeline* _pipeline;
  struct EncoderArguments* _arguments;
  bool _ended;
}
@end
