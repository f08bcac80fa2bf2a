// metal_compat.h for ctypes: tests reach the stand-in inside the extension without a word of it in the product's Python.
#include "metal_compat.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
namespace compat = ferrum::metal_compat;

EXPORT long ferrum_metal_compat_live_objects() { return compat::live_objects(); }
EXPORT size_t ferrum_metal_compat_allocated_bytes() { return compat::allocated_bytes(); }
EXPORT int64_t ferrum_metal_compat_committed() { return compat::committed_command_buffers(); }
EXPORT void ferrum_metal_compat_fail(int64_t number, long code) { compat::fail_command_buffer(number, code); }
EXPORT void ferrum_metal_compat_set_executor(uint64_t seed, int threads) { compat::set_executor_options({seed, threads}); }
