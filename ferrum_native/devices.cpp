#include "devices.h"

#include "core/comparing_backend.h"
#include "core/failing_backend.h"
#include "core/profiling_backend.h"
#include "cpu/cpu_backend.h"
#ifdef FERRUM_METAL
#include "metal/metal.h"
#endif

namespace ferrum {

namespace {

#if defined(FERRUM_METAL) && defined(__APPLE__)
constexpr const char* best_device = "metal";
#else
constexpr const char* best_device = "cpu";
#endif

std::unique_ptr<Backend> make_metal(const DeviceOptions& options) {
#ifdef FERRUM_METAL
  return metal::make_metal_backend({options.kernel_library, options.kernel_source});
#else
  static_cast<void>(options);
  throw Error(ErrorKind::Device,
              "this build of ferrum has no Metal. It is built in on a Mac, and on Linux with clang and libobjc "
              "(apt-get install clang libobjc-12-dev, or a newer one): FERRUM_METAL=on pip install . says what is missing.");
#endif
}

std::unique_ptr<Backend> make_device(const std::string& device, const DeviceOptions& options) {
  const std::string chosen = device == "auto" ? best_device : device;
  if (chosen == "cpu") return std::make_unique<cpu::CpuBackend>(cpu::CpuOptions{options.threads, options.float_activations, options.instruction_set});
  if (chosen == "metal") return make_metal(options);
  throw Error(ErrorKind::InvalidArgument, "device " + device + " is not one of auto, cpu, metal.");
}

}  // namespace

std::unique_ptr<Backend> make_backend(const DeviceOptions& options) {
  std::unique_ptr<Backend> backend = make_device(options.device, options);
  if (!options.compare_with.empty()) backend = std::make_unique<ComparingBackend>(make_device(options.compare_with, options), std::move(backend), options.compare_tolerance);
  if (options.fail_at >= 0) backend = std::make_unique<FailingBackend>(std::move(backend), options.fail_at);
  if (options.profile) backend = std::make_unique<ProfilingBackend>(std::move(backend));
  return backend;
}

}  // namespace ferrum
