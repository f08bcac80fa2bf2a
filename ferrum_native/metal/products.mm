// The ops that multiply with weights, and the rule of which kernel does it: few columns by GEMV, many by tiles of matrices.
#include "../../metal_src/shared/embed.h"
#include "../../metal_src/shared/experts_down.h"
#include "../../metal_src/shared/experts_gate_up.h"
#include "../../metal_src/shared/linear.h"
#include "metal_backend.h"

namespace ferrum::metal {
namespace {

/// Columns up to which GEMVs read the weights: each pass takes several columns.
constexpr int most_gemv_columns = 16;
/// (token, expert) pairs for each expert, on average, up to which larger steps multiply pair by pair too.
constexpr int most_gemv_pairs_of_expert = 4;

int type_id(const Weight* weight) { return weight ? static_cast<int>(weight->tensor.type) : -1; }

Kernel kernel(std::string_view name, const Weight* a, const Weight* b = nullptr, const Weight* c = nullptr) { return {name, {{0, type_id(a)}, {1, type_id(b)}, {2, type_id(c)}}}; }

uint32_t row_bytes(const Weight& weight) { return static_cast<uint32_t>(weight.tensor.row_bytes()); }

struct Gemv { std::string_view kernel; int columns; };
Gemv linear_gemv(int rows) {
  if (rows == 1) return {"linear_gemv_c1", 1};
  if (rows == 2) return {"linear_gemv_c2", 2};
  if (rows <= 4) return {"linear_gemv_c4", 4};
  return {"linear_gemv_c8", 8};
}

bool few_pairs(const MetalRouting& r) {
  return r.pairs() <= shared::experts_down_most_pairs && (r.rows <= most_decode_rows || r.pairs() <= most_gemv_pairs_of_expert * r.experts);
}

}  // namespace

void MetalBackend::embed(const EmbedArgs& a) {
  const shared::EmbedArgs args{a.table.tensor.cols, row_bytes(a.table)};
  encode(kernel("embed", &a.table), args, {place(a.table), step_.token_ids(), step_.tokens(), place(a.out)},
         {.groups = {groups_for(args.cols, shared::embed_block), static_cast<size_t>(step_.step().tokens)}, .threads = shared::embed_threads});
}

void MetalBackend::linear(const LinearArgs& a) {
  const Weight* weights[3] = {};
  std::copy(a.weights.begin(), a.weights.end(), weights);
  const bool few = a.rows <= most_gemv_columns;
  shared::LinearArgs args{a.x.cols, {}, {}};
  size_t blocks = 0;
  for (size_t i = 0; i < a.weights.size(); ++i) {
    args.rows[i] = weights[i]->tensor.rows;
    args.row_bytes[i] = row_bytes(*weights[i]);
    blocks += few ? groups_for(args.rows[i], shared::gemv_block) : groups_for(args.rows[i], shared::gemm_rows);
  }
  const Place first = place(*weights[0]), second = weights[1] ? place(*weights[1]) : first, third = weights[2] ? place(*weights[2]) : first;
  const Gemv gemv = linear_gemv(a.rows);
  const Grid gemv_grid{{blocks, groups_for(a.rows, gemv.columns)}, shared::gemv_threads};
  const Grid gemm_grid{{blocks, groups_for(a.rows, shared::gemm_columns)}, shared::gemm_threads, shared::gemm_threadgroup_bytes};
  encode(kernel(few ? gemv.kernel : "linear_gemm", weights[0], weights[1], weights[2]), args, {first, second, third, place(a.x), count_of(a.rows), place(a.out)}, few ? gemv_grid : gemm_grid);
}

void MetalBackend::experts_gate_up(const ExpertsGateUpArgs& a) {
  const MetalRouting& r = static_cast<const MetalRouting&>(a.routing);
  const RoutingLayout& at = r.layout;
  const int F = a.gate.tensor.rows;
  const shared::ExpertsGateUpArgs args{a.gate.tensor.cols, F, row_bytes(a.gate), row_bytes(a.up), r.top_k};
  if (few_pairs(r))
    encode(kernel(r.rows == 1 ? "experts_gate_up_gemv_c1" : "experts_gate_up_gemv_c4", &a.gate, &a.up), args,
           {place(a.gate), place(a.up), place(a.x), r.place(at.ids), r.place(at.start), r.place(at.pairs), count_of(r.rows), place(a.out)},
           {{groups_for(F, shared::gemv_block), static_cast<size_t>(r.pairs())}, shared::gemv_threads});
  else
    encode(kernel("experts_gate_up_gemm", &a.gate, &a.up), args,
           {place(a.gate), place(a.up), place(a.x), r.place(at.start), r.place(at.pairs), r.place(at.tiles), r.place(at.tile_count), place(a.out)},
           {{groups_for(F, shared::gemm_rows / 2), r.most_tiles()}, shared::gemm_threads, shared::gemm_threadgroup_bytes});
}

void MetalBackend::experts_down(const ExpertsDownArgs& a) {
  const MetalRouting& r = static_cast<const MetalRouting&>(a.routing);
  const RoutingLayout& at = r.layout;
  const int H = a.down.tensor.rows;
  const shared::ExpertsDownArgs args{a.down.tensor.cols, H, row_bytes(a.down), r.top_k};
  const Place count = count_of(r.rows);
  if (few_pairs(r)) {
    encode(kernel(r.rows == 1 ? "experts_down_gemv_c1" : "experts_down_gemv_c4", &a.down), args,
           {place(a.down), place(a.x), r.place(at.ids), r.place(at.weights), r.place(at.start), r.place(at.pairs), count, place(a.out)},
           {{groups_for(H, shared::experts_down_rows)}, shared::gemv_threads, static_cast<size_t>(r.pairs()) * shared::experts_down_rows * sizeof(float)});
    return;
  }
  const Place products = scratch(scratch_layout_.products);
  encode(kernel("experts_down_gemm", &a.down), args, {place(a.down), place(a.x), r.place(at.start), r.place(at.pairs), r.place(at.tiles), r.place(at.tile_count), products},
         {{groups_for(H, shared::gemm_rows), r.most_tiles()}, shared::gemm_threads, shared::gemm_threadgroup_bytes});
  encode(kernel("experts_down_sum", &a.down), args, {products, r.place(at.weights), count, place(a.out)},
         {{groups_for(H, shared::experts_down_sum_threads), static_cast<size_t>(r.rows)}, shared::experts_down_sum_threads});
}

}  // namespace ferrum::metal
