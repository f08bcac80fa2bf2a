// Compiles kernel source at run time, by the mslc.py that lies beside the extension.
#pragma once
#include <string>

namespace ferrum::metal_compat {

struct Compiled {
  std::string library, folder, error;  // either the first two or the last
};
Compiled compile_source(const std::string& source);
void remove_folder(const std::string& folder);

}  // namespace ferrum::metal_compat
