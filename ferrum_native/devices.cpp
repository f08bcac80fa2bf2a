#include "devices.h"

#include "core/failing_backend.h"
#include "core/profiling_backend.h"
#include "cpu/cpu_backend.h"

namespace ferrum {

namespace {

std::unique_ptr<Backend> make_device(const DeviceOptions& options) {
  if (options.device == "auto" || options.device == "cpu")
    return std::make_unique<cpu::CpuBackend>(cpu::CpuOptions{options.threads, options.float_activations, options.instruction_set});
  throw Error(ErrorKind::InvalidArgument, "device " + options.device + " is not one of auto, cpu.");
}

}  // namespace

std::unique_ptr<Backend> make_backend(const DeviceOptions& options) {
  std::unique_ptr<Backend> backend = make_device(options);
  if (options.fail_at >= 0) backend = std::make_unique<FailingBackend>(std::move(backend), options.fail_at);
  if (options.profile) backend = std::make_unique<ProfilingBackend>(std::move(backend));
  return backend;
}

}  // namespace ferrum
