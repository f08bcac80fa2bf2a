// The Metal backend, as C++ sees it.
#pragma once
#include <memory>
#include <string>

#include "../core/backend.h"

namespace ferrum::metal {

/// Where the kernels come from: a compiled library, or else their source.
struct KernelSource {
  std::string library_path;  // empty: compile `text`
  std::string text;
};

/// Throws Error(Device) where there is no Metal device or where it does not take the kernels.
/// Activations are float32 in every mode.
std::unique_ptr<Backend> make_metal_backend(const KernelSource&);

}  // namespace ferrum::metal
