// Barriers and the operations across a simdgroup. Each is a meeting of lanes in the executor, told apart by its place in the source.
#pragma once
#include "math.h"

extern "C" const msl::Runtime* msl_runtime;

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

// The executor tells meetings apart by the code that calls it: calls of two branches may not become one.
#define MSL_MEETING [[clang::nomerge]]
#define MSL_HERE const char *msl_file = __builtin_FILE(), int msl_line = __builtin_LINE()
inline void threadgroup_barrier(mem_flags flags, MSL_HERE) {
  const msl::Site site{msl_file, msl_line, "threadgroup_barrier"};
  MSL_MEETING msl_runtime->threadgroup_barrier(uint(flags), &site);
}
inline void simdgroup_barrier(mem_flags flags, MSL_HERE) {
  const msl::Site site{msl_file, msl_line, "simdgroup_barrier"};
  MSL_MEETING msl_runtime->exchange(nullptr, 0, uint(flags), &site);
}

/// What all lanes gave to one exchange.
template <class T> struct Lanes {
  const unsigned char* slots;
  T operator[](uint lane) const {
    T value;
    __builtin_memcpy_inline(&value, slots + msl::EXCHANGE_BYTES * lane, sizeof value);
    return value;
  }
};
#define MSL_EXCHANGE(name)                                                         \
  static_assert(sizeof value <= msl::EXCHANGE_BYTES, name ": at most 16 bytes");   \
  const msl::Site msl_site{msl_file, msl_line, name};                              \
  const unsigned char* msl_slots;                                                  \
  MSL_MEETING msl_slots = msl_runtime->exchange(&value, sizeof value, 0, &msl_site); \
  const Lanes<T> lanes{msl_slots}

/// A tree over the lanes. The hardware's order is unspecified: tests of sums need a tolerance.
template <class T, class F> inline T msl_reduce(const Lanes<T>& lanes, F f) {
  T t[32];
  for (uint i = 0; i < 32; i++) t[i] = lanes[i];
  for (uint width = 16; width; width >>= 1)
    for (uint i = 0; i < width; i++) t[i] = f(t[i], t[i + width]);
  return t[0];
}
#define MSL_REDUCTION(name, value_of)                \
  template <class T> inline T name(T value, MSL_HERE) { \
    MSL_EXCHANGE(#name);                             \
    return msl_reduce(lanes, [](T a, T b) { return T(value_of); }); \
  }
MSL_REDUCTION(simd_sum, a + b) MSL_REDUCTION(simd_product, a * b) MSL_REDUCTION(simd_max, max(a, b)) MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_and, a & b) MSL_REDUCTION(simd_or, a | b) MSL_REDUCTION(simd_xor, a ^ b)
#undef MSL_REDUCTION

#define MSL_PREFIX(name, first, end, op)                \
  template <class T> inline T name(T value, MSL_HERE) { \
    MSL_EXCHANGE(#name);                                \
    const uint last = msl_runtime->lane() end;          \
    T r = T(first);                                     \
    for (uint i = 0; i < last; i++) r = T(r op lanes[i]); \
    return r;                                           \
  }
MSL_PREFIX(simd_prefix_exclusive_sum, 0, , +) MSL_PREFIX(simd_prefix_inclusive_sum, 0, +1, +)
MSL_PREFIX(simd_prefix_exclusive_product, 1, , *) MSL_PREFIX(simd_prefix_inclusive_product, 1, +1, *)
#undef MSL_PREFIX

template <class T> inline T simd_shuffle(T value, ushort lane, MSL_HERE) {
  MSL_EXCHANGE("simd_shuffle");
  return lanes[lane & 31];
}
template <class T> inline T simd_shuffle_xor(T value, ushort mask, MSL_HERE) {
  MSL_EXCHANGE("simd_shuffle_xor");
  return lanes[(msl_runtime->lane() ^ mask) & 31];
}
template <class T> inline T simd_shuffle_down(T value, ushort delta, MSL_HERE) {
  MSL_EXCHANGE("simd_shuffle_down");
  const uint from = msl_runtime->lane() + delta;
  return from < 32 ? lanes[from] : value;
}
template <class T> inline T simd_shuffle_up(T value, ushort delta, MSL_HERE) {
  MSL_EXCHANGE("simd_shuffle_up");
  const uint lane = msl_runtime->lane();
  return lane >= delta ? lanes[lane - delta] : value;
}
template <class T> inline T simd_broadcast(T value, ushort lane, MSL_HERE) {
  MSL_EXCHANGE("simd_broadcast");
  return lanes[lane & 31];
}
template <class T> inline T simd_broadcast_first(T value, MSL_HERE) {
  MSL_EXCHANGE("simd_broadcast_first");
  return lanes[0];
}
inline bool simd_is_first() { return msl_runtime->lane() == 0; }

class simd_vote {
 public:
  typedef ulong vote_t;
  explicit simd_vote(vote_t votes) : votes_(votes) {}
  explicit operator vote_t() const { return votes_; }
  bool all() const { return votes_ == 0xffffffff; }
  bool any() const { return votes_ != 0; }

 private:
  vote_t votes_;
};
inline simd_vote simd_ballot(bool value, MSL_HERE) {
  typedef bool T;
  MSL_EXCHANGE("simd_ballot");
  ulong votes = 0;
  for (uint i = 0; i < 32; i++) votes |= ulong(lanes[i]) << i;
  return simd_vote(votes);
}
inline bool simd_all(bool value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return simd_ballot(value, file, line).all(); }
inline bool simd_any(bool value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return simd_ballot(value, file, line).any(); }

}  // namespace metal
