// Plain C++: runs everywhere, and defines what the other instruction sets compute.
#define FERRUM_ISA scalar
#include "isa.inl"

namespace ferrum::cpu {
constinit const Kernels kernels_scalar = scalar::make_kernels("scalar");
}
