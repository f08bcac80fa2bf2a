#include "rows.h"

namespace ferrum::cpu {

void CpuBackend::embed(const EmbedArgs& args) {
  const CpuWeight& table = static_cast<const CpuWeight&>(args.table);
  const auto dequantize = kernels_.dequantize[weight_type_index(static_cast<int>(table.tensor.type))];
  each_row(batch_->tokens, args.out.cols, [&](int t) { dequantize(table.row(0, batch_->token_ids[static_cast<size_t>(t)]), args.out.cols, row(args.out, t)); });
}

}  // namespace ferrum::cpu
