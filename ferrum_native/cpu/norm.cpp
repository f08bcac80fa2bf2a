#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::norm(const NormArgs& args) {
  CpuActivation& out = static_cast<CpuActivation&>(args.out);
  const auto* weight = reinterpret_cast<const float*>(args.weight.tensor.data);
  each_row(args.rows, out.cols, [&](int i) {
    kernels_.norm({.residual = row(args.residual, i), .delta = args.delta ? row(*args.delta, i) : nullptr, .weight = weight, .size = out.cols, .eps = args.eps, .out = out.row(i)});
    out.pack(kernels_, i);
  });
}

}  // namespace ferrum::cpu
