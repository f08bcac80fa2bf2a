#include <algorithm>
#include <chrono>

#include "../../metal_src/shared/read_bandwidth.h"
#include "metal_backend.h"

namespace ferrum::metal {
namespace {

constexpr size_t group_bytes = shared::bandwidth_vectors_of_group * 16;
constexpr size_t most_measured = 512 << 20;  // far beyond any cache
constexpr double enough_seconds = 0.02;      // of one pass, against which the start of a command buffer is little
constexpr int passes = 5;

}  // namespace

double MetalBackend::read_bandwidth(size_t most_bytes) {
  using Clock = std::chrono::steady_clock;
  const size_t most_groups = std::max<size_t>(std::min(most_bytes, most_measured) / group_bytes, 1);
  const auto data = device_.allocate(most_groups * group_bytes), sums = device_.allocate(most_groups * shared::bandwidth_threads * sizeof(uint32_t));
  const shared::ReadBandwidthArgs args{shared::bandwidth_vectors_of_group};
  size_t groups = std::min<size_t>(most_groups, 16);
  double best = 0;
  for (int pass = 0; pass < passes;) {
    const Clock::time_point start = Clock::now();
    encode({"read_bandwidth"}, args, {place(data), place(sums)}, {{groups}, shared::bandwidth_threads});
    stream_.run();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(groups * group_bytes) / seconds);
    if (seconds >= enough_seconds || groups == most_groups) ++pass;
    else groups = std::min(most_groups, 4 * groups);
  }
  return best;
}

}  // namespace ferrum::metal
