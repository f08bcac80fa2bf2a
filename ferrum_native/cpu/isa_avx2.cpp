// Compiled with -mavx2 -mfma -mf16c; called where the processor has all three.
#if defined(__x86_64__)
#define FERRUM_SIMD_AVX2 1
#define FERRUM_ISA avx2
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_avx2 = avx2::make_kernels("avx2");
}
#endif
