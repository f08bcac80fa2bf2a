#include "devices.h"

#include "cpu/cpu_backend.h"

namespace ferrum {

std::unique_ptr<Backend> make_backend(const DeviceOptions& options) {
  if (options.device == "auto" || options.device == "cpu")
    return std::make_unique<cpu::CpuBackend>(cpu::CpuOptions{options.threads, options.float_activations, options.instruction_set});
  throw Error(ErrorKind::InvalidArgument, "device " + options.device + " is not one of auto, cpu.");
}

}  // namespace ferrum
