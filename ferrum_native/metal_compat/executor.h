// Runs compiled kernels on CPU fibers: one fiber per GPU thread, a simdgroup's and a threadgroup's lanes meet at barriers.
// Every run fills threadgroup memory with NaNs first, and reports what a GPU would leave undefined.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernel_library.h"

namespace ferrum::fibers {

struct Span {
  char* data = nullptr;
  size_t bytes = 0;
};
struct ConstantValue {
  uint32_t index;
  unsigned char value[8];
};

struct Kernel {
  const msl::KernelEntry* entry;
  const msl::File* file;
};

/// A shared object that mslc.py made.
class KernelLibrary {
 public:
  explicit KernelLibrary(const std::string& path);  // throws std::runtime_error
  ~KernelLibrary();
  KernelLibrary(const KernelLibrary&) = delete;
  KernelLibrary& operator=(const KernelLibrary&) = delete;
  const Kernel* find(const std::string& name) const;  // null if there is none
  std::vector<std::string> names() const;
  bool instrumented() const { return library_->checks & msl::INSTRUMENTED; }

 private:
  void* handle_;
  const msl::Library* library_;
  std::vector<Kernel> kernels_;
};

struct Dispatch {
  const Kernel* kernel;
  bool instrumented = false;
  uint32_t number = 1;  // counts dispatches, for the race detector
  Span buffers[msl::MAX_BUFFERS];
  size_t threadgroup_bytes[msl::MAX_THREADGROUP_ARGS] = {};
  uint32_t grid[3], threads[3];
  std::vector<ConstantValue> constants;
};

struct Options {
  uint64_t seed = 0;  // of the order of lanes and threadgroups; 0: rising
  int threads = 0;    // workers, 0: one per core. Instrumented kernels run on one
};

/// The function constants that `kernel` needs and `values` lack, as a message, or "".
std::string missing_constant(const Kernel& kernel, const std::vector<ConstantValue>& values);
/// What Metal's validation would refuse: an unbound or short buffer, sizes out of range. "" if nothing.
std::string refused(const Dispatch&);
/// Runs a dispatch to its end or to its first fault; returns that, or "".
std::string run(const Dispatch&, const Options&);

}  // namespace ferrum::fibers
