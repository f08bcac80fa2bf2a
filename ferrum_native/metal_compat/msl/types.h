// Scalar types and the pieces of C++'s library that Metal offers too.
#pragma once
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernel_library.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
static_assert(sizeof(half) == 2 && sizeof(long) == 8, "");

/// The upper half of a float; rounds to nearest even.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bits = uint16_t((word & 0x7fffffff) > 0x7f800000 ? word >> 16 | 64 : (word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

namespace metal {
using std::conditional;
using std::enable_if;
using std::is_same;
using std::numeric_limits;
}  // namespace metal

template <class To, class From> inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}
