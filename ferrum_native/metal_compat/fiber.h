// A switch between stacks of one thread: saves what a call must preserve, 5 ns.
#pragma once
#include <cstddef>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define FERRUM_FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FERRUM_FIBER_ASAN 1
#endif
#endif
#ifdef FERRUM_FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void ferrum_fiber_switch(void** save, void* to);

namespace ferrum::fibers {

struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
};

/// Leaves the running stack, whose pointer goes to `save`, for one that was left before or is new. `dying`: never to come back.
inline void switch_to(void** save, void* to, [[maybe_unused]] Stack stack, [[maybe_unused]] bool dying) {
#ifdef FERRUM_FIBER_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(dying ? nullptr : &fake, stack.bottom, stack.bytes);
  ferrum_fiber_switch(save, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  ferrum_fiber_switch(save, to);
#endif
}
/// First thing on a new stack.
inline void entered() {
#ifdef FERRUM_FIBER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

/// Forgets what the sanitizer noted about frames of a fiber that ended without returning from them.
inline void forget_frames([[maybe_unused]] void* top) {
#ifdef FERRUM_FIBER_ASAN
  constexpr size_t DEEPEST = 16 * 1024;  // of ours; kernels are not instrumented
  __asan_unpoison_memory_region(static_cast<char*>(top) - DEEPEST, DEEPEST);
#endif
}

/// Stack pointer of a fiber that will start in `entry`. `top` is a multiple of 16.
inline void* new_fiber(void* top, void (*entry)()) {
  forget_frames(top);
  void** sp = static_cast<void**>(top);
#if defined(__x86_64__)
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);  // reached by ret, so that sp % 16 is 8 as after a call
  sp -= 6;
  std::memset(sp, 0, 6 * sizeof(void*));
#elif defined(__aarch64__)
  sp -= 20;
  std::memset(sp, 0, 20 * sizeof(void*));
  sp[11] = reinterpret_cast<void*>(entry);  // x30
#else
#error "the fiber executor knows x86-64 and aarch64"
#endif
  return sp;
}

}  // namespace ferrum::fibers
