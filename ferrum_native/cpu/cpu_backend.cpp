#include "cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "arm_features.h"

namespace ferrum::cpu {
namespace {

struct Forms {
  bool q8_32 = false, q8_256 = false;
};

Forms forms_for(std::span<const WeightType> consumers, bool float_activations) {
  Forms forms;
  if (float_activations) return forms;
  for (WeightType type : consumers) {
    forms.q8_32 |= info(type).form == ActivationForm::Q8_32;
    forms.q8_256 |= info(type).form == ActivationForm::Q8_256;
  }
  return forms;
}

}  // namespace

const Kernels& choose_kernels(const std::string& instruction_set) {
  if (instruction_set == "scalar") return kernels_scalar;
#if defined(__x86_64__)
  const bool runs_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  // Each says yes only where the system also saves the registers.
  const bool runs_avx512 = runs_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (runs_avx512 && (instruction_set.empty() || instruction_set == "avx512")) return kernels_avx512;
  if (runs_avx2 && (instruction_set.empty() || instruction_set == "avx2")) return kernels_avx2;
#elif defined(__aarch64__)
  const ArmFeatures arm = arm_features();
  if (arm.dotprod && arm.i8mm && (instruction_set.empty() || instruction_set == "neon-i8mm")) return kernels_neon_i8mm;
  if (arm.dotprod && (instruction_set.empty() || instruction_set == "neon-dotprod")) return kernels_neon_dotprod;
  if (instruction_set.empty() || instruction_set == "neon") return kernels_neon;
#endif
  if (instruction_set.empty()) return kernels_scalar;
  throw Error(ErrorKind::InvalidArgument, "instruction set " + instruction_set + " is unknown or not of this machine. Choose avx512 (x86-64 with AVX-512 F, BW, DQ, VL and VNNI), avx2 (x86-64 with AVX2, FMA and F16C), neon-i8mm (arm64 with FEAT_DotProd and FEAT_I8MM), neon-dotprod (arm64 with FEAT_DotProd), neon (arm64) or scalar.");
}

CpuActivation::CpuActivation(int r, int c, bool with_q8_32, bool with_q8_256) : Activation(r, c), arena(bytes(r, c, with_q8_32, with_q8_256)) {
  const size_t n = static_cast<size_t>(r) * static_cast<size_t>(c);
  values = arena.take<float>(n);
  if (with_q8_32) {
    q8_32 = arena.take<int8_t>(n);
    scale_32 = arena.take<float>(n / 32);
  }
  if (with_q8_256) {
    q8_256 = arena.take<int8_t>(n);
    scale_256 = arena.take<float>(n / 256);
    factor_32 = arena.take<int16_t>(n / 32);
    sums_16 = arena.take<int16_t>(n / 16);
  }
}

size_t CpuActivation::bytes(int r, int c, bool with_q8_32, bool with_q8_256) {
  const size_t n = static_cast<size_t>(r) * static_cast<size_t>(c);
  size_t total = Arena::bytes_for(n, sizeof(float));
  if (with_q8_32) total += Arena::bytes_for(n, 1) + Arena::bytes_for(n / 32, sizeof(float));
  if (with_q8_256) total += Arena::bytes_for(n, 1) + Arena::bytes_for(n / 256, sizeof(float)) + Arena::bytes_for(n / 32, sizeof(int16_t)) + Arena::bytes_for(n / 16, sizeof(int16_t));
  return total;
}

Column CpuActivation::column(int index) const {
  const size_t at = static_cast<size_t>(index) * static_cast<size_t>(cols);
  Column column{values + at, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (q8_32) column.q8_32 = q8_32 + at, column.scale_32 = scale_32 + at / 32;
  if (q8_256) column.q8_256 = q8_256 + at, column.scale_256 = scale_256 + at / 256, column.factor_32 = factor_32 + at / 32, column.sums_16 = sums_16 + at / 16;
  return column;
}

void CpuActivation::pack(const Kernels& kernels, int index) {
  const size_t at = static_cast<size_t>(index) * static_cast<size_t>(cols);
  if (q8_32) kernels.quantize_q8_32(values + at, cols, q8_32 + at, scale_32 + at / 32);
  if (q8_256) kernels.quantize_q8_256(values + at, cols, {q8_256 + at, scale_256 + at / 256, factor_32 + at / 32, sums_16 + at / 16});
}

CpuRouting::CpuRouting(int r, int k, int e) : top_k(k), experts(e), arena(bytes(r, k, e)) {
  const size_t n = static_cast<size_t>(r), pair_count = n * static_cast<size_t>(k), E = static_cast<size_t>(e);
  logits = arena.take<float>(n * E);
  ids = arena.take<int32_t>(pair_count);
  weights = arena.take<float>(pair_count);
  start = arena.take<int32_t>(E + 1);
  pairs = arena.take<int32_t>(pair_count);
  active = arena.take<int32_t>(E);
}

size_t CpuRouting::bytes(int r, int k, int e) {
  const size_t n = static_cast<size_t>(r), pair_count = n * static_cast<size_t>(k), E = static_cast<size_t>(e);
  return Arena::bytes_for(n * E, 4) + 3 * Arena::bytes_for(pair_count, 4) + Arena::bytes_for(E + 1, 4) + Arena::bytes_for(E, 4);
}

CpuKv::CpuKv(const KvShape& s) : shape(s), keys(static_cast<size_t>(s.layers) * static_cast<size_t>(s.blocks) * block_bytes()), values(keys.bytes()) {}

CpuBackend::CpuBackend(const CpuOptions& options)
    : options_(options), kernels_(choose_kernels(options.instruction_set)), pool_(std::max(1, options.threads)) {}

std::string CpuBackend::name() const {
  return std::string("cpu (") + kernels_.name + ", " + std::to_string(pool_.threads()) + (pool_.threads() == 1 ? " thread)" : " threads)");
}

std::unique_ptr<Weight> CpuBackend::place_weight(const WeightTensor& tensor) {
  const int index = weight_type_index(static_cast<int>(tensor.type));
  return std::make_unique<CpuWeight>(tensor, options_.float_activations ? kernels_.dot_float[index] : kernels_.dot[index]);
}

std::unique_ptr<Activation> CpuBackend::make_activation(int rows, int cols, std::span<const WeightType> consumers) {
  const Forms forms = forms_for(consumers, options_.float_activations);
  return std::make_unique<CpuActivation>(rows, cols, forms.q8_32, forms.q8_256);
}

size_t CpuBackend::activation_bytes(int rows, int cols, std::span<const WeightType> consumers) const {
  const Forms forms = forms_for(consumers, options_.float_activations);
  return CpuActivation::bytes(rows, cols, forms.q8_32, forms.q8_256);
}

size_t CpuBackend::kv_bytes(const KvShape& s) const {
  return 2 * static_cast<size_t>(s.layers) * static_cast<size_t>(s.blocks) * static_cast<size_t>(s.heads) * kv_block_tokens * kv_row_bytes(s.type, s.head_dim);
}

size_t CpuBackend::visit_scratch(const StepLimits& limits, Arena* take, std::vector<ThreadScratch>& scratch, float*& splits, float*& shared_products, Column*& columns) const {
  size_t total = 0;
  auto piece = [&]<class T>(T*& pointer, size_t count) {
    if (take) pointer = take->take<T>(count);
    total += Arena::bytes_for(count, sizeof(T));
  };
  const auto T = static_cast<size_t>(limits.tokens), pairs = T * static_cast<size_t>(limits.top_k);
  const int group = limits.heads.heads / limits.heads.kv_heads;
  scratch.resize(static_cast<size_t>(pool_.threads()));
  for (ThreadScratch& s : scratch) {
    piece(s.dot, kernels_.dot_scratch_bytes(limits.largest_cols));
    piece(s.out, T);
    piece(s.products, pairs * expert_task_rows);
    piece(s.attention, 2 * partial_floats(query_tile * group, limits.heads.head_dim));
    const auto rows = static_cast<size_t>(query_tile * group), D = static_cast<size_t>(limits.heads.head_dim);
    piece(s.q_16, rows * D);
    piece(s.q_scale, rows * (D / kv_group));
  }
  const auto units = static_cast<size_t>(std::min(static_cast<int64_t>(limits.sequences) * limits.heads.kv_heads, static_cast<int64_t>(units_to_split_below())));
  piece(splits, units * static_cast<size_t>((limits.context + split_keys - 1) / split_keys) * partial_floats(group, limits.heads.head_dim));
  piece(shared_products, std::min(T, size_t{most_tokens_of_shared_products}) * static_cast<size_t>(limits.top_k) * static_cast<size_t>(limits.largest_cols));
  piece(columns, pairs);
  return total;
}

size_t CpuBackend::scratch_bytes(const StepLimits& limits) const {
  std::vector<ThreadScratch> scratch;
  float *splits, *shared_products;
  Column* columns;
  return visit_scratch(limits, nullptr, scratch, splits, shared_products, columns);
}

void CpuBackend::reserve_scratch(const StepLimits& limits) {
  arena_ = std::make_unique<Arena>(scratch_bytes(limits));
  visit_scratch(limits, arena_.get(), scratch_, split_partials_, shared_products_, columns_);
  tiles_.reserve(static_cast<size_t>(limits.tokens));
  pool_.start();
  product_floats_ = limits.tokens * limits.top_k * expert_task_rows;
}

void CpuBackend::begin(const Batch& batch) {
  batch_ = &batch;
  tiles_.clear();
  for (int s = 0; s < batch.sequences; ++s) {
    const int start = batch.query_start[static_cast<size_t>(s)], end = batch.query_start[static_cast<size_t>(s) + 1];
    // The last tile first: it sees the longest context, and long tasks are best begun early.
    for (int first = start + (end - start - 1) / query_tile * query_tile; first >= start; first -= query_tile)
      tiles_.push_back({s, first, std::min(query_tile, end - first)});
  }
}

void CpuBackend::copy_kv_blocks(Kv& kv, std::span<const BlockCopy> copies) {
  CpuKv& pool = static_cast<CpuKv&>(kv);
  for (const BlockCopy& copy : copies)
    for (int layer = 0; layer < pool.shape.layers; ++layer) {
      const size_t from = pool.offset(layer, copy.from, 0), to = pool.offset(layer, copy.to, 0);
      std::memcpy(pool.keys.host() + to, pool.keys.host() + from, pool.block_bytes());
      std::memcpy(pool.values.host() + to, pool.values.host() + from, pool.block_bytes());
    }
}

void CpuBackend::poison_kv_blocks(Kv& kv, std::span<const int32_t> blocks) {
  CpuKv& pool = static_cast<CpuKv&>(kv);
  for (int32_t block : blocks)
    for (int layer = 0; layer < pool.shape.layers; ++layer) {  // bytes 0xff are a NaN in f16 and in f32, and make one of a scale of Q8_0
      std::memset(pool.keys.host() + pool.offset(layer, block, 0), 0xff, pool.block_bytes());
      std::memset(pool.values.host() + pool.offset(layer, block, 0), 0xff, pool.block_bytes());
    }
}

}  // namespace ferrum::cpu
