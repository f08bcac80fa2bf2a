#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

#include "executor.h"
#include "lanes.h"

namespace ferrum::fibers {

KernelLibrary::KernelLibrary(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (!handle_) throw std::runtime_error(dlerror());
  library_ = static_cast<const msl::Library*>(dlsym(handle_, "msl_library"));
  if (!library_ || library_->version != msl::LIBRARY_VERSION) {
    dlclose(handle_);
    throw std::runtime_error(path + " is no kernel library of this version of ferrum; build it anew.");
  }
  *library_->runtime = runtime();
  for (uint32_t i = 0; i < library_->file_count; ++i)
    for (uint32_t k = 0; k < library_->files[i]->kernel_count; ++k) kernels_.push_back({&library_->files[i]->kernels[k], library_->files[i]});
}

KernelLibrary::~KernelLibrary() { dlclose(handle_); }

const Kernel* KernelLibrary::find(const std::string& name) const {
  for (const Kernel& kernel : kernels_)
    if (name == kernel.entry->name) return &kernel;
  return nullptr;
}

std::vector<std::string> KernelLibrary::names() const {
  std::vector<std::string> found;
  for (const Kernel& kernel : kernels_) found.push_back(kernel.entry->name);
  return found;
}

}  // namespace ferrum::fibers
