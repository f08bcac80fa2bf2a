// NEON, compiled for armv8.2-a with dot products; called where the processor has them.
#if defined(__aarch64__)
#define FERRUM_SIMD_NEON 1
#define FERRUM_SIMD_DOTPROD 1
#define FERRUM_ISA neon_dotprod
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_neon_dotprod = neon_dotprod::make_kernels("neon-dotprod");
}
#endif
