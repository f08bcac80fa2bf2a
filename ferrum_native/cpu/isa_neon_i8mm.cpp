// NEON, compiled for armv8.2-a with dot products and products of int8 matrices; called where the processor has both.
#if defined(__aarch64__)
#define FERRUM_SIMD_NEON 1
#define FERRUM_SIMD_DOTPROD 1
#define FERRUM_SIMD_I8MM 1
#define FERRUM_ISA neon_i8mm
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_neon_i8mm = neon_i8mm::make_kernels("neon-i8mm");
}
#endif
