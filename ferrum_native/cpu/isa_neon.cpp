// NEON as every arm64 processor has it.
#if defined(__aarch64__)
#define FERRUM_SIMD_NEON 1
#define FERRUM_ISA neon
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_neon = neon::make_kernels("neon");
}
#endif
