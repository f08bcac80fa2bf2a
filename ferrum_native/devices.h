// Which backends there are: a device by name.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "core/backend.h"

namespace ferrum {

struct DeviceOptions {
  std::string device = "auto";  // "auto", "cpu", "metal"
  int threads = 1;
  bool float_activations = false;
  bool profile = false;         // count time, bytes and products of every op
  std::string instruction_set;  // of the CPU: "avx2", "neon", "scalar" and others of cpu/kernels.h; empty: the best
  std::string kernel_library;   // of Metal: path of the compiled kernels; empty: `kernel_source` is compiled
  std::string kernel_source;
  int64_t fail_at = -1;         // tests: the call of a step that fails once; -1: none
  std::string compare_with;     // tools: another device that computes every op first, whose outputs `device` must give; empty: none
  double compare_tolerance = 1e-4;  // of the largest value of a row
};

/// Throws InvalidArgument for a device that there is not, Device for one that this build or machine lacks.
std::unique_ptr<Backend> make_backend(const DeviceOptions& options);

}  // namespace ferrum
