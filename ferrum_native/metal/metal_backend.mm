#include "metal_backend.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "../../metal_src/shared/kv_layout.h"
#include "../../metal_src/shared/route.h"
#include "../core/kv_transfer.h"

namespace ferrum::metal {
namespace {

/// What kernels ask of a weight's address: vector loads of blocks and of float rows.
size_t alignment(WeightType type) {
  switch (type) {
    case WeightType::Q4_0:
    case WeightType::Q4_1:
    case WeightType::Q5_0:
    case WeightType::Q5_1:
    case WeightType::Q8_0:
    case WeightType::Q3_K:
    case WeightType::Q6_K:
    case WeightType::IQ4_NL: return 2;
    case WeightType::Q2_K: return 4;
    case WeightType::IQ4_XS:
    case WeightType::F16:
    case WeightType::BF16: return 8;
    case WeightType::F32:
    case WeightType::Q4_K:
    case WeightType::Q5_K: return 16;
  }
  return 16;
}

}  // namespace

std::unique_ptr<Backend> make_metal_backend(const KernelSource& source) { return std::make_unique<MetalBackend>(source); }

RoutingLayout::RoutingLayout(int rows, int top_k, int experts) {
  const int pair_count = rows * top_k;
  const size_t ids_bytes = static_cast<size_t>(pair_count) * sizeof(int32_t);
  Layout layout;
  ids = layout.piece(ids_bytes);
  weights = layout.piece(ids_bytes);
  start = layout.piece((static_cast<size_t>(experts) + 1) * sizeof(int32_t));
  pairs = layout.piece(ids_bytes);
  tiles = layout.piece(static_cast<size_t>(shared::most_expert_tiles(pair_count, experts)) * 2 * sizeof(int32_t));
  tile_count = layout.piece(sizeof(int32_t));
  bytes = layout.bytes();
}

MetalBackend::ScratchLayout::ScratchLayout(const StepLimits& l) {
  const auto splits = static_cast<size_t>(shared::attention_splits_up_to(l.context)), heads = static_cast<size_t>(l.heads.heads);
  const size_t parts = static_cast<size_t>(l.sequences) * heads * splits;
  Layout layout;
  attention_values = layout.piece(parts * static_cast<size_t>(l.heads.head_dim) * sizeof(float));
  attention_stats = layout.piece(parts * 2 * sizeof(float));
  products = layout.piece(static_cast<size_t>(l.tokens) * static_cast<size_t>(l.top_k) * static_cast<size_t>(l.largest_cols) * sizeof(float));
  bytes = layout.bytes();
}

MetalBackend::MetalBackend(const KernelSource& source)
    : device_(source, counters_), stream_(device_, counters_), step_(device_), scratch_layout_(StepLimits{1, 1, 1, 1, {1, 1, 8}, 1, 1}), block_copies_(device_), candidates_(device_) {}

std::string MetalBackend::name() const { return "metal (" + device_.name() + ")"; }

std::unique_ptr<Weight> MetalBackend::place_weight(const WeightTensor& tensor) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<size_t>(tensor.data);
  if (address % alignment(tensor.type) != 0)
    throw Error(ErrorKind::UnsupportedModel, "the file's tensors are aligned to less than the 16 bytes that the Metal kernels load at once. "
                                             "Convert the model again with the usual alignment of 32, or choose device=\"cpu\".");
  const size_t offset = address % page, span = (offset + tensor.bytes() + page - 1) / page * page;
  return std::make_unique<MetalWeight>(tensor, device_.wrap(tensor.data - offset, span), offset);
}

std::unique_ptr<Activation> MetalBackend::make_activation(int rows, int cols, std::span<const WeightType>) { return std::make_unique<MetalActivation>(device_, rows, cols); }

std::unique_ptr<Routing> MetalBackend::make_routing(int rows, int top_k, int experts) {
  if (experts > shared::route_most_experts || top_k > shared::route_most_top_k)
    throw Error(ErrorKind::UnsupportedModel, "the model chooses " + std::to_string(top_k) + " of " + std::to_string(experts) + " experts; ferrum's Metal kernels take up to " +
                                                 std::to_string(shared::route_most_top_k) + " of " + std::to_string(shared::route_most_experts) + ". Choose device=\"cpu\".");
  return std::make_unique<MetalRouting>(device_, rows, top_k, experts);
}

std::unique_ptr<Kv> MetalBackend::make_kv(const KvShape& shape) { return std::make_unique<MetalKv>(device_, shape); }

size_t MetalBackend::activation_bytes(int rows, int cols, std::span<const WeightType>) const { return MetalActivation::bytes(rows, cols); }
size_t MetalBackend::routing_bytes(int rows, int top_k, int experts) const { return RoutingLayout(rows, top_k, experts).bytes; }
size_t MetalBackend::kv_bytes(const KvShape& shape) const {
  if (shape.type == KvType::Q8_0)
    throw Error(ErrorKind::Device, "kv_type q8_0 runs on the CPU only: ferrum's Metal kernels keep keys and values in f16 or f32. Choose kv_type f16 or device cpu.");
  return 2 * MetalKv::bytes(shape);
}
size_t MetalBackend::scratch_bytes(const StepLimits& limits) const { return ScratchLayout(limits).bytes + StepData::bytes(limits); }

void MetalBackend::reserve_scratch(const StepLimits& limits) {
  scratch_layout_ = ScratchLayout(limits);
  if (!scratch_ || scratch_->bytes() < scratch_layout_.bytes) scratch_ = device_.allocate(scratch_layout_.bytes);
  step_.reserve(limits);
  block_copies_.reserve(static_cast<size_t>(limits.sequences) * sizeof(BlockCopy));
  device_.load_kernels();
}

void MetalBackend::begin(const Batch& batch) {
  abandon();
  step_.write(batch);
  ++counters_.uploads;
}

void MetalBackend::finish() {
  try {
    stream_.run();
  } catch (...) {
    abandon();
    throw;
  }
  deliver_candidates();
}

void MetalBackend::abandon() {
  stream_.abandon();
  if (pending_)
    for (auto original = pending_->originals.rbegin(); original != pending_->originals.rend(); ++original) *original->first = original->second;
  pending_.reset();
}

Place MetalBackend::count_of(int rows) {
  const shared::Step& step = step_.step();
  if (rows == step.tokens) return step_.tokens();
  if (rows == step.logit_rows) return step_.logit_count();
  if (rows != step.any_rows) {
    if (!stream_.empty()) throw Error(ErrorKind::Device, "internal: two calls outside of a step have different rows. Call finish between them.");
    step_.write_rows(rows);
    ++counters_.uploads;
  }
  return step_.any_rows();
}

void MetalBackend::write_activation(Activation& x, int rows, const float* values) { std::memcpy(static_cast<MetalActivation&>(x).values(), values, MetalActivation::bytes(rows, x.cols)); }

void MetalBackend::read_activation(const Activation& x, int rows, float* out) { std::memcpy(out, static_cast<const MetalActivation&>(x).values(), MetalActivation::bytes(rows, x.cols)); }

void MetalBackend::read_routing(const Routing& given, const RoutingContents& out) {
  const MetalRouting& r = static_cast<const MetalRouting&>(given);
  std::copy_n(r.host<int32_t>(r.layout.ids), r.pairs(), out.ids);
  std::copy_n(r.host<float>(r.layout.weights), r.pairs(), out.weights);
  std::copy_n(r.host<int32_t>(r.layout.start), r.experts + 1, out.start);
  std::copy_n(r.host<int32_t>(r.layout.pairs), r.pairs(), out.pairs);
}

void MetalBackend::read_kv(const Kv& kv, std::span<const int32_t> blocks, int tokens, std::byte* out) {
  const MetalKv& pool = static_cast<const MetalKv&>(kv);
  read_kv_blocks(pool.shape, pool.keys->host(), pool.values->host(), blocks, tokens, out, shared::kv_key_element);
}

void MetalBackend::write_kv(Kv& kv, std::span<const int32_t> blocks, int tokens, const std::byte* data) {
  const MetalKv& pool = static_cast<const MetalKv&>(kv);
  write_kv_blocks(pool.shape, pool.keys->host(), pool.values->host(), blocks, tokens, data, shared::kv_key_element);
}

void MetalBackend::poison_kv_blocks(Kv& kv, std::span<const int32_t> blocks) {
  abandon();
  const MetalKv& pool = static_cast<const MetalKv&>(kv);
  const size_t size = MetalKv::block_bytes(pool.shape);
  for (int32_t block : blocks)
    for (int layer = 0; layer < pool.shape.layers; ++layer) {  // bytes 0xff are a NaN in f16 and in f32
      const size_t at = (static_cast<size_t>(layer) * static_cast<size_t>(pool.shape.blocks) + static_cast<size_t>(block)) * size;
      std::memset(pool.keys->host() + at, 0xff, size);
      std::memset(pool.values->host() + at, 0xff, size);
    }
}

}  // namespace ferrum::metal
