// From a ThreadContext to a kernel's parameters: their types come from the kernel's own declaration, their meaning from its attributes.
#pragma once
#include "vectors.h"

namespace msl {

inline void* pointer_argument(const ThreadContext& c, ArgSlot slot) {
  return slot.kind == ArgKind::ThreadgroupMemory ? c.threadgroup[slot.index] : c.buffers[slot.index];
}
inline uint32_t position(const ThreadContext& c, ArgSlot slot, int axis) {
  switch (slot.kind) {
    case ArgKind::ThreadgroupPositionInGrid: return c.threadgroup_position_in_grid[axis];
    case ArgKind::ThreadPositionInThreadgroup: return c.thread_position_in_threadgroup[axis];
    case ArgKind::ThreadPositionInGrid: return c.thread_position_in_grid[axis];
    case ArgKind::ThreadsPerThreadgroup: return c.threads_per_threadgroup[axis];
    case ArgKind::ThreadgroupsPerGrid: return c.threadgroups_per_grid[axis];
    case ArgKind::ThreadsPerGrid: return c.threads_per_grid[axis];
    case ArgKind::ThreadIndexInThreadgroup: return c.thread_index_in_threadgroup;
    case ArgKind::ThreadIndexInSimdgroup: return c.thread_index_in_simdgroup;
    case ArgKind::SimdgroupIndexInThreadgroup: return c.simdgroup_index_in_threadgroup;
    case ArgKind::SimdgroupsPerThreadgroup: return c.simdgroups_per_threadgroup;
    case ArgKind::ThreadsPerSimdgroup: return SIMD_WIDTH;
    default: return 0;
  }
}

template <class T> constexpr bool is_position() { return std::is_same<T, uint32_t>::value || std::is_same<T, uint16_t>::value; }
#define MSL_POSITION(T) static_assert(is_position<T>(), "a position is uint or ushort, or a vector of them")
template <class A> struct Argument {
  MSL_POSITION(A);
  enum { smallest = 0, only_read = 1 };
  static A get(const ThreadContext& c, ArgSlot slot) { return A(position(c, slot, 0)); }
};
template <class T> struct Argument<T*> {
  enum { smallest = 0, only_read = std::is_const<T>::value };
  static T* get(const ThreadContext& c, ArgSlot slot) { return static_cast<T*>(pointer_argument(c, slot)); }
};
template <class T> struct Argument<T&> {
  enum { smallest = sizeof(T), only_read = std::is_const<T>::value };
  static T& get(const ThreadContext& c, ArgSlot slot) { return *static_cast<T*>(pointer_argument(c, slot)); }
};
template <class T> struct Argument<metal::vec<T, 2>> {
  MSL_POSITION(T);
  enum { smallest = 0, only_read = 1 };
  static metal::vec<T, 2> get(const ThreadContext& c, ArgSlot slot) { return metal::vec<T, 2>(T(position(c, slot, 0)), T(position(c, slot, 1))); }
};
template <class T> struct Argument<metal::vec<T, 3>> {
  MSL_POSITION(T);
  enum { smallest = 0, only_read = 1 };
  static metal::vec<T, 3> get(const ThreadContext& c, ArgSlot slot) {
    return metal::vec<T, 3>(T(position(c, slot, 0)), T(position(c, slot, 1)), T(position(c, slot, 2)));
  }
};

#undef MSL_POSITION
template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I> struct MakeIndices<0, I...> { typedef Indices<I...> type; };

template <class F> struct Signature;
template <class... A> struct Signature<void(A...)> {
  template <size_t... I> static void call(void (*kernel)(A...), const ArgSlot* slots, const ThreadContext& c, Indices<I...>) {
    kernel(Argument<A>::get(c, slots[I])...);
  }
  static void call(void (*kernel)(A...), const ArgSlot* slots, const ThreadContext& c) { call(kernel, slots, c, typename MakeIndices<sizeof...(A)>::type()); }
  static constexpr uint32_t smallest[] = {Argument<A>::smallest..., 0};
  static constexpr bool only_read[] = {bool(Argument<A>::only_read)..., true};
  static constexpr uint32_t count = sizeof...(A);
};

}  // namespace msl

// The kernel comes last, because k<T, 8> holds a comma.
#define MSL_ENTRY(id, host, ...)                                                                                             \
  static_assert(sizeof(msl_slots_##id) / sizeof(msl::ArgSlot) == msl::Signature<decltype(__VA_ARGS__)>::count, host ": attributes"); \
  static void msl_call_##id(const msl::ThreadContext& c) { msl::Signature<decltype(__VA_ARGS__)>::call(&__VA_ARGS__, msl_slots_##id, c); } \
  static constexpr const uint32_t* msl_smallest_##id = msl::Signature<decltype(__VA_ARGS__)>::smallest;                       \
  static constexpr const bool* msl_only_read_##id = msl::Signature<decltype(__VA_ARGS__)>::only_read;
