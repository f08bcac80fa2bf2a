// What a compiled kernel library and the fiber executor know of each other. Included by both sides: plain data only.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace msl {

enum : uint32_t { LIBRARY_VERSION = 2, MAX_BUFFERS = 31, MAX_THREADGROUP_ARGS = 8, SIMD_WIDTH = 32, EXCHANGE_BYTES = 16 };

/// What a kernel parameter's attribute asks for.
enum class ArgKind : uint8_t {
  Buffer, ThreadgroupMemory, ThreadgroupPositionInGrid, ThreadPositionInThreadgroup, ThreadPositionInGrid, ThreadIndexInThreadgroup,
  ThreadIndexInSimdgroup, SimdgroupIndexInThreadgroup, SimdgroupsPerThreadgroup, ThreadsPerThreadgroup, ThreadgroupsPerGrid,
  ThreadsPerSimdgroup, ThreadsPerGrid
};
struct ArgSlot { ArgKind kind; uint8_t index; };

/// One GPU thread's view of its dispatch.
struct ThreadContext {
  void* buffers[MAX_BUFFERS];
  void* threadgroup[MAX_THREADGROUP_ARGS];
  uint32_t threadgroup_position_in_grid[3], thread_position_in_threadgroup[3], thread_position_in_grid[3];
  uint32_t threads_per_threadgroup[3], threadgroups_per_grid[3], threads_per_grid[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};

struct KernelEntry {
  const char* name;
  void (*invoke)(const ThreadContext&);
  const ArgSlot* slots;
  const uint32_t* smallest;   // bytes that a reference argument needs, 0 for pointers and positions
  const bool* only_read;      // whether an argument's memory is only read
  uint32_t slot_count;
  uint64_t constants;         // bit i: reads, directly or through functions, the file's function constant number i
};
struct FunctionConstant {
  uint32_t index;
  const char* name;
  const char* type;           // as in the source: "bool", "int", "uint", "short", "ushort", "float"
  void* value;
  bool* defined;              // for is_function_constant_defined
  uint32_t bytes;
};

struct Site { const char* file; int line; const char* operation; };

/// What the executor offers to kernels.
struct Runtime {
  /// Meets the other lanes of the simdgroup; returns 32 slots of EXCHANGE_BYTES. A null `value` is a barrier with `memory` flags.
  const unsigned char* (*exchange)(const void* value, uint32_t bytes, uint32_t memory, const Site*);
  void (*threadgroup_barrier)(uint32_t memory, const Site*);
  uint32_t (*lane)();
  /// Called by instrumented builds for every load and store. `kind`: 0 read, 1 write, 2 atomic.
  void (*access)(const void* address, uint32_t bytes, uint32_t kind, const void* code);
};

enum : uint32_t { INSTRUMENTED = 1, TRAPS_UNDEFINED = 2 };

/// What one .metal file holds.
struct File {
  const KernelEntry* kernels;
  uint32_t kernel_count;
  const FunctionConstant* constants;
  uint32_t constant_count;
};
struct Library {
  uint32_t version, checks;
  const File* const* files;
  uint32_t file_count;
  const Runtime** runtime;  // the executor writes itself here
};

}  // namespace msl
