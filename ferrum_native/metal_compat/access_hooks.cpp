// Receives clang's -fsanitize=thread instrumentation in place of its runtime. Linked into kernel libraries that were built with checks.
#include "kernel_library.h"

extern "C" const msl::Runtime* msl_runtime;

namespace {
enum : uint32_t { READ, WRITE, ATOMIC };
}
#define ACCESS(address, bytes, kind) msl_runtime->access((const void*)(address), uint32_t(bytes), kind, __builtin_return_address(0))

extern "C" {
#define HOOKS(n)                                                    \
  void __tsan_read##n(void* p) { ACCESS(p, n, READ); }              \
  void __tsan_write##n(void* p) { ACCESS(p, n, WRITE); }            \
  void __tsan_unaligned_read##n(void* p) { ACCESS(p, n, READ); }    \
  void __tsan_unaligned_write##n(void* p) { ACCESS(p, n, WRITE); }  \
  void __tsan_read_write##n(void* p) { ACCESS(p, n, READ); ACCESS(p, n, WRITE); } \
  void __tsan_unaligned_read_write##n(void* p) { ACCESS(p, n, READ); ACCESS(p, n, WRITE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, unsigned long n) { ACCESS(from, n, READ); ACCESS(to, n, WRITE); return __builtin_memcpy(to, from, n); }
void* __tsan_memmove(void* to, const void* from, unsigned long n) { ACCESS(from, n, READ); ACCESS(to, n, WRITE); return __builtin_memmove(to, from, n); }
void* __tsan_memset(void* to, int value, unsigned long n) { ACCESS(to, n, WRITE); return __builtin_memset(to, value, n); }

#define FETCH(op) \
  int __tsan_atomic32_fetch_##op(volatile int* p, int x, int) { ACCESS(p, 4, ATOMIC); return __atomic_fetch_##op(p, x, __ATOMIC_RELAXED); }
FETCH(add) FETCH(sub) FETCH(and) FETCH(or) FETCH(xor)
int __tsan_atomic32_load(const volatile int* p, int) { ACCESS(p, 4, ATOMIC); return __atomic_load_n(p, __ATOMIC_RELAXED); }
void __tsan_atomic32_store(volatile int* p, int x, int) { ACCESS(p, 4, ATOMIC); __atomic_store_n(p, x, __ATOMIC_RELAXED); }
int __tsan_atomic32_exchange(volatile int* p, int x, int) { ACCESS(p, 4, ATOMIC); return __atomic_exchange_n(p, x, __ATOMIC_RELAXED); }
int __tsan_atomic32_compare_exchange_strong(volatile int* p, int* expected, int x, int, int) {
  ACCESS(p, 4, ATOMIC);
  return __atomic_compare_exchange_n(p, expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
int __tsan_atomic32_compare_exchange_weak(volatile int* p, int* expected, int x, int, int) {
  return __tsan_atomic32_compare_exchange_strong(p, expected, x, 0, 0);
}
int __tsan_atomic32_compare_exchange_val(volatile int* p, int expected, int x, int, int) {
  ACCESS(p, 4, ATOMIC);
  __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
}
