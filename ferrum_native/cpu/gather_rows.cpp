#include <cstring>

#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::gather_rows(const Activation& x, Activation& out) {
  const CpuActivation& from = static_cast<const CpuActivation&>(x);
  CpuActivation& to = static_cast<CpuActivation&>(out);
  for (int i = 0; i < batch_->logit_count(); ++i) {
    std::memcpy(to.row(i), from.row(batch_->logit_rows[static_cast<size_t>(i)]), static_cast<size_t>(x.cols) * sizeof(float));
    to.pack(kernels_, i);
  }
}

void CpuBackend::gather_rows(const Tensor& x, const Tensor& out) {
  for (int i = 0; i < batch_->logit_count(); ++i)
    std::memcpy(row(out, i), row(x, batch_->logit_rows[static_cast<size_t>(i)]), static_cast<size_t>(x.cols) * sizeof(float));
}

}  // namespace ferrum::cpu
