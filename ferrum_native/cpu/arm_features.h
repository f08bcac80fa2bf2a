// What an arm64 processor can do beyond NEON.
#pragma once
#if defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace ferrum::cpu {

struct ArmFeatures {
  bool dotprod = false, i8mm = false;
};

inline ArmFeatures arm_features() {
  ArmFeatures found;
#if defined(__linux__)
  // Bits of the kernel's ABI (asm/hwcap.h); older headers lack their names.
  constexpr unsigned long asimddp = 1ul << 20, i8mm = 1ul << 13;
  found.dotprod = getauxval(AT_HWCAP) & asimddp;
  found.i8mm = getauxval(AT_HWCAP2) & i8mm;
#elif defined(__APPLE__)
  auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  found.dotprod = has("hw.optional.arm.FEAT_DotProd");
  found.i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  return found;
}

}  // namespace ferrum::cpu
#endif
