// The fiber executor for ctypes: what tests/metal_runner.py calls.
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "metal_compat/executor.h"

using namespace ferrum::fibers;

struct HostBuffer {
  void* data;
  size_t bytes;
};
struct HostConstant {
  uint32_t index;
  unsigned char value[8];
};
struct HostDispatch {
  const char* kernel;
  const HostBuffer* buffers;
  const size_t* threadgroup_bytes;
  const HostConstant* constants;
  uint32_t buffer_count, constant_count, grid[3], threads[3];
  uint64_t seed;
  int workers;
};

extern "C" {

void* ferrum_metal_open(const char* path, char* error, size_t error_bytes) {
  try {
    return new KernelLibrary(path);
  } catch (const std::runtime_error& failure) {
    snprintf(error, error_bytes, "%s", failure.what());
    return nullptr;
  }
}

/// "index type" of a named function constant of the kernel's file; returns 0 where there is none.
int ferrum_metal_constant(void* library, const char* kernel, const char* name, uint32_t* index, const char** type) {
  const Kernel* found = static_cast<KernelLibrary*>(library)->find(kernel);
  for (uint32_t i = 0; found && i < found->file->constant_count; ++i) {
    const msl::FunctionConstant& constant = found->file->constants[i];
    if (name ? std::strcmp(constant.name, name) != 0 : constant.index != *index) continue;
    *index = constant.index;
    *type = constant.type;
    return 1;
  }
  return 0;
}

const char* ferrum_metal_name(void* library, size_t number) {
  static thread_local std::string name;
  const std::vector<std::string> names = static_cast<KernelLibrary*>(library)->names();
  if (number >= names.size()) return nullptr;
  name = names[number];
  return name.c_str();
}

void ferrum_metal_run(void* opened, const HostDispatch* host, char* error, size_t error_bytes) {
  const KernelLibrary& library = *static_cast<KernelLibrary*>(opened);
  Dispatch dispatch;
  dispatch.kernel = library.find(host->kernel);
  dispatch.instrumented = library.instrumented();
  if (!dispatch.kernel) {
    snprintf(error, error_bytes, "no kernel is named %s", host->kernel);
    return;
  }
  for (uint32_t i = 0; i < host->buffer_count; ++i) dispatch.buffers[i] = {static_cast<char*>(host->buffers[i].data), host->buffers[i].bytes};
  std::memcpy(dispatch.threadgroup_bytes, host->threadgroup_bytes, sizeof dispatch.threadgroup_bytes);
  std::memcpy(dispatch.grid, host->grid, sizeof dispatch.grid);
  std::memcpy(dispatch.threads, host->threads, sizeof dispatch.threads);
  for (uint32_t i = 0; i < host->constant_count; ++i) {
    ConstantValue value{host->constants[i].index, {}};
    std::memcpy(value.value, host->constants[i].value, sizeof value.value);
    dispatch.constants.push_back(value);
  }
  snprintf(error, error_bytes, "%s", run(dispatch, {host->seed, host->workers}).c_str());
}
}
