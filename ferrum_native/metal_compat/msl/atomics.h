// Relaxed atomics of int and uint, which is all that kernels may use.
#pragma once
#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(is_same<T, int>::value || is_same<T, uint>::value, "atomics are of int or uint");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;

template <class T> inline T atomic_load_explicit(const volatile atomic<T>* p, memory_order) { return __atomic_load_n(&p->value, __ATOMIC_RELAXED); }
template <class T> inline void atomic_store_explicit(volatile atomic<T>* p, T x, memory_order) { __atomic_store_n(&p->value, x, __ATOMIC_RELAXED); }
template <class T> inline T atomic_exchange_explicit(volatile atomic<T>* p, T x, memory_order) { return __atomic_exchange_n(&p->value, x, __ATOMIC_RELAXED); }
template <class T> inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, T x, memory_order, memory_order) {
  return __atomic_compare_exchange_n(&p->value, expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#define MSL_FETCH(op)                                                                                      \
  template <class T> inline T atomic_fetch_##op##_explicit(volatile atomic<T>* p, T x, memory_order) { \
    return __atomic_fetch_##op(&p->value, x, __ATOMIC_RELAXED);                                            \
  }
MSL_FETCH(add) MSL_FETCH(sub) MSL_FETCH(and) MSL_FETCH(or) MSL_FETCH(xor)
#undef MSL_FETCH
template <class T> inline T atomic_fetch_max_explicit(volatile atomic<T>* p, T x, memory_order) {
  T seen = __atomic_load_n(&p->value, __ATOMIC_RELAXED);
  while (seen < x && !__atomic_compare_exchange_n(&p->value, &seen, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return seen;
}
template <class T> inline T atomic_fetch_min_explicit(volatile atomic<T>* p, T x, memory_order) {
  T seen = __atomic_load_n(&p->value, __ATOMIC_RELAXED);
  while (x < seen && !__atomic_compare_exchange_n(&p->value, &seen, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return seen;
}

}  // namespace metal
