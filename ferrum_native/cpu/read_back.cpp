#include <algorithm>
#include <cstring>

#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::write_activation(Activation& activation, int rows, const float* values) {
  CpuActivation& x = static_cast<CpuActivation&>(activation);
  std::memcpy(x.values, values, static_cast<size_t>(rows) * static_cast<size_t>(x.cols) * sizeof(float));
  pack_rows(x, rows);
}

void CpuBackend::read_activation(const Activation& activation, int rows, float* out) {
  const CpuActivation& x = static_cast<const CpuActivation&>(activation);
  std::memcpy(out, x.values, static_cast<size_t>(rows) * static_cast<size_t>(x.cols) * sizeof(float));
}

void CpuBackend::read_routing(const Routing& given, const RoutingContents& out) {
  const CpuRouting& routing = static_cast<const CpuRouting&>(given);
  const int pairs = routing.rows * routing.top_k;
  std::copy_n(routing.ids, pairs, out.ids);
  std::copy_n(routing.weights, pairs, out.weights);
  std::copy_n(routing.start, routing.experts + 1, out.start);
  std::copy_n(routing.pairs, pairs, out.pairs);
}

}  // namespace ferrum::cpu
