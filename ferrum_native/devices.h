// Which backends there are: a device by name.
#pragma once
#include <memory>
#include <string>

#include "core/backend.h"

namespace ferrum {

struct DeviceOptions {
  std::string device = "auto";  // "auto", "cpu"
  int threads = 1;
  bool float_activations = false;
  bool profile = false;         // count time, bytes and products of every op
  std::string instruction_set;  // of the CPU: "avx2", "scalar"; empty: the best
  int64_t fail_at = -1;         // tests: the call of a step that fails once; -1: none
};

std::unique_ptr<Backend> make_backend(const DeviceOptions& options);

}  // namespace ferrum
