// What tests and tools ask of the Metal stand-in, in C++. The core never sees this header.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace ferrum::metal_compat {

struct ExecutorOptions {
  uint64_t seed = 0;  // of the order of lanes and threadgroups; 0: rising
  int threads = 0;    // 0: one per core
};
/// For command buffers that are committed from now on, in the whole process.
void set_executor_options(const ExecutorOptions&);

/// Objective-C objects that are alive in the process, constant strings aside.
long live_objects();
/// Bytes in buffers that are alive, no-copy ones aside.
size_t allocated_bytes();

/// Makes one command buffer fail with this MTLCommandBufferError, after half of its dispatches: the `number`-th of those committed from now on, from 0.
/// A negative number: none.
void fail_command_buffer(int64_t number, long code);
/// Command buffers that were committed so far.
int64_t committed_command_buffers();

}  // namespace ferrum::metal_compat
