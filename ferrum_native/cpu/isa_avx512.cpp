// Compiled with the flags of isa_avx2.cpp and AVX-512 F, BW, DQ, VL and VNNI; called where the processor and the system have them all.
#if defined(__x86_64__)
#define FERRUM_SIMD_AVX2 1
#define FERRUM_SIMD_AVX512 1
#define FERRUM_ISA avx512
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_avx512 = avx512::make_kernels("avx512");
}
#endif
