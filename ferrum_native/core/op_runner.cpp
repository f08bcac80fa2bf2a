#include "op_runner.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace ferrum {
namespace {

WeightType weight_type(int type_id) {
  const int index = weight_type_index(type_id);
  if (index < 0) throw Error(ErrorKind::InvalidArgument, "ferrum does not compute with ggml type " + std::to_string(type_id) + ".");
  return weight_types[index].type;
}

void download(const Tensor& tensor, float* out) {
  std::memcpy(out, tensor.buffer->host() + tensor.offset, static_cast<size_t>(tensor.rows) * static_cast<size_t>(tensor.cols) * sizeof(float));
}

}  // namespace

OpRunner::Upload OpRunner::upload(const float* values, int rows, int cols) {
  const size_t bytes = static_cast<size_t>(rows) * static_cast<size_t>(cols) * sizeof(float);
  Upload upload{backend_->allocate(bytes), {}};
  upload.tensor = {upload.buffer.get(), 0, rows, cols};
  if (values) std::memcpy(upload.buffer->host(), values, bytes);
  return upload;
}

void OpRunner::reserve(const Batch& batch, const HeadShape& heads, int largest_cols) {
  const int context = batch.context_length.empty() ? 1 : *std::max_element(batch.context_length.begin(), batch.context_length.end());
  backend_->reserve_scratch({batch.tokens, std::max(1, batch.sequences), batch.logit_count(), context, heads, largest_cols, 1});
}

void OpRunner::reserve_rows(int rows, int largest_cols, int top_k) { backend_->reserve_scratch({rows, 1, rows, 1, {1, 1, 8}, largest_cols, top_k}); }

std::unique_ptr<OwnedWeight> OpRunner::place_weight(int type_id, WeightTensor tensor) {
  tensor.type = weight_type(type_id);
  auto owned = std::make_unique<OwnedWeight>();
  void* bytes = nullptr;
  constexpr size_t page = 16384;  // whole pages, as a mapping has them
  if (posix_memalign(&bytes, page, (tensor.bytes() / page + 1) * page) != 0) throw Error(ErrorKind::OutOfMemory, "the system refused the memory of a weight.");
  owned->bytes.reset(static_cast<std::byte*>(bytes));
  std::memcpy(bytes, tensor.data, tensor.bytes());
  tensor.data = owned->bytes.get();
  owned->weight = backend_->place_weight(tensor);
  return owned;
}

std::unique_ptr<Activation> OpRunner::make_activation(int rows, int cols, const std::vector<int>& consumer_type_ids) {
  std::vector<WeightType> consumers;
  for (int type_id : consumer_type_ids) consumers.push_back(weight_type(type_id));
  return backend_->make_activation(rows, cols, consumers);
}

void OpRunner::write_activation(Activation& activation, int rows, const float* values) { backend_->write_activation(activation, rows, values); }

void OpRunner::read_activation(const Activation& activation, int rows, float* out) { backend_->read_activation(activation, rows, out); }

void OpRunner::embed(const Batch& batch, const Weight& table, float* out) {
  const Upload rows = upload(nullptr, batch.tokens, table.tensor.cols);
  reserve(batch, {1, 1, 8}, table.tensor.cols);
  backend_->begin(batch);
  backend_->embed({.table = table, .out = rows.tensor});
  backend_->finish();
  download(rows.tensor, out);
}

void OpRunner::norm(const HostNorm& a) {
  const Upload residual = upload(a.residual, a.rows, a.out->cols), delta = upload(a.delta, a.rows, a.out->cols);
  reserve_rows(a.rows, a.out->cols, 1);
  backend_->norm({.residual = residual.tensor, .delta = a.delta ? &delta.tensor : nullptr, .weight = *a.weight, .eps = a.eps, .rows = a.rows, .out = *a.out});
  backend_->finish();
  download(residual.tensor, a.residual);
}

void OpRunner::linear(const Activation& x, int rows, const std::vector<const Weight*>& weights, float* out) {
  int cols = 0;
  for (const Weight* weight : weights) cols += weight->tensor.rows;
  const Upload result = upload(nullptr, rows, cols);
  reserve_rows(rows, x.cols, 1);
  backend_->linear({.x = x, .rows = rows, .weights = weights, .out = result.tensor});
  backend_->finish();
  download(result.tensor, out);
}

void OpRunner::qk_norm_rope_cache(const Batch& batch, const HostQkv& a) {
  const int D = a.shape.head_dim;
  const Upload qkv = upload(a.qkv, batch.tokens, (a.shape.heads + 2 * a.shape.kv_heads) * D), q = upload(nullptr, batch.tokens, a.shape.heads * D);
  reserve(batch, a.shape, a.shape.heads * D);
  backend_->begin(batch);
  backend_->qk_norm_rope_cache({.qkv = qkv.tensor, .q_norm = a.q_norm, .k_norm = a.k_norm, .eps = a.eps, .shape = a.shape, .rotary_dim = a.rotary_dim,
                                .layer = a.layer, .kv = *a.kv, .q_out = q.tensor});
  backend_->finish();
  download(q.tensor, a.q_out);
}

void OpRunner::attention(const Batch& batch, const HostAttention& a) {
  const Upload q = upload(a.q, batch.tokens, a.shape.heads * a.shape.head_dim);
  reserve(batch, a.shape, q.tensor.cols);
  backend_->begin(batch);
  backend_->attention({.q = q.tensor, .kv = *a.kv, .layer = a.layer, .shape = a.shape, .scale = a.scale, .out = *a.out});
  backend_->finish();
}

void OpRunner::route(const HostRoute& a) {
  reserve_rows(a.rows, a.x->cols, a.top_k);
  backend_->route({.x = *a.x, .rows = a.rows, .router = *a.router, .top_k = a.top_k, .normalize = a.normalize, .out = *a.out});
  backend_->finish();
}

void OpRunner::experts_gate_up(const HostExperts& a, Activation& out) {
  reserve_rows(a.rows, a.x->cols, a.top_k);
  backend_->experts_gate_up({.x = *a.x, .routing = *a.routing, .gate = *a.first, .up = *a.second, .out = out});
  backend_->finish();
}

void OpRunner::experts_down(const HostExperts& a, float* out) {
  const Upload result = upload(nullptr, a.rows, a.first->tensor.rows);
  reserve_rows(a.rows, std::max(a.x->cols, result.tensor.cols), a.top_k);
  backend_->experts_down({.x = *a.x, .routing = *a.routing, .down = *a.first, .out = result.tensor});
  backend_->finish();
  download(result.tensor, out);
}

void OpRunner::gather_activation(const Batch& batch, const Activation& x, Activation& out) {
  reserve(batch, {1, 1, 8}, x.cols);
  backend_->begin(batch);
  backend_->gather_rows(x, out);
  backend_->finish();
}

void OpRunner::gather_values(const Batch& batch, const float* x, int cols, float* out) {
  const Upload from = upload(x, batch.tokens, cols), to = upload(nullptr, batch.logit_count(), cols);
  reserve(batch, {1, 1, 8}, cols);
  backend_->begin(batch);
  backend_->gather_rows(from.tensor, to.tensor);
  backend_->finish();
  download(to.tensor, out);
}

void OpRunner::top_candidates(float* values, int rows, int vocab, TopCandidatesArgs args) {
  const Upload logits = upload(values, rows, vocab);
  reserve_rows(rows, vocab, 1);
  args.logits = logits.tensor;
  backend_->top_candidates(args);
  backend_->finish();
  download(logits.tensor, values);
}

void OpRunner::copy_kv_blocks(Kv& kv, const std::vector<BlockCopy>& copies) {
  backend_->copy_kv_blocks(kv, copies);
  backend_->finish();
}

void OpRunner::poison_kv_blocks(Kv& kv, const std::vector<int32_t>& blocks) {
  backend_->poison_kv_blocks(kv, blocks);
  backend_->finish();
}

}  // namespace ferrum
