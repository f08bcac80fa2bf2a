// route: a threadgroup takes rows_of_pass rows at a time. For the product a simdgroup holds 4 experts by all those rows, for the choice it takes one
// row and a lane holds every 32nd expert. Grouping is a counting sort by one threadgroup, a lane an expert. Everything happens in a fixed order.
#include "gemv.h"
#include "rows.h"
#include "shared/route.h"

using namespace ferrum;
using namespace ferrum::shared;

enum { route_experts_of_pass = 4 };
static_assert(route_most_top_k == 64, "a lane holds the weights of two k");
enum : uint { key_taken = 0 };

/// Of a number's ordered_key.
inline float value_of_key(uint key) { return as_type<float>((key >> 31) != 0 ? key & 0x7fffffffu : ~key); }

/// Chooses the experts of one row from its logits (as bits), which become keys. A NaN among them makes all weights NaN, by the sum.
inline void choose_experts(constant RouteArgs& args, threadgroup uint* row, device int32_t* ids, device float* weights, ushort lane) {
  float largest = -INFINITY;
  for (int e = lane; e < args.experts; e += 32) largest = max(largest, as_type<float>(row[e]));
  largest = simd_max(largest);
  float sum = 0.0f;
  for (int e = lane; e < args.experts; e += 32) {
    const float logit = as_type<float>(row[e]);
    sum += exp_below_zero(logit - largest);
    row[e] = ordered_key(logit);
  }
  sum = simd_sum(sum);
  float first = 0.0f, second = 0.0f;  // weights of k = lane and lane + 32
  float total = 0.0f;
  for (int k = 0; k < args.top_k; ++k) {
    uint best = key_taken;
    int best_expert = args.experts;
    for (int e = lane; e < args.experts; e += 32)
      if (row[e] > best) {
        best = row[e];
        best_expert = e;
      }
    const uint key = simd_max(best);
    const int expert = simd_min(best == key ? best_expert : args.experts);
    if (expert % 32 == lane) row[expert] = key_taken;
    const float weight = exp_below_zero(value_of_key(key) - largest) / sum;
    total += weight;
    if (lane == 0) ids[k] = expert;
    if (k == lane) first = weight;
    if (k == lane + 32) second = weight;
  }
  const float divisor = args.normalize != 0 ? total : 1.0f;
  if (lane < args.top_k) weights[lane] = first / divisor;
  if (lane + 32 < args.top_k) weights[lane + 32] = second / divisor;
}

/// Where the grouping puts what it finds.
struct Groups {
  device int32_t* start;
  device int32_t* pairs;
  device int32_t* tiles;
  device int32_t* tile_count;
};

/// Turns counts [segments, padded] into the positions at which each segment's pairs of an expert begin; a lane takes neighbouring experts.
inline void place_groups(threadgroup int* counts, int segments, int padded, int experts, Groups out, ushort lane) {
  const int experts_of_lane = padded / 32;
  int pairs = 0, tiles = 0;
  for (int e = lane * experts_of_lane; e < (lane + 1) * experts_of_lane; ++e) {
    int count = 0;
    for (int s = 0; s < segments; ++s) count += counts[s * padded + e];
    pairs += count;
    tiles += (count + expert_tile_pairs - 1) / expert_tile_pairs;
  }
  int at = sum_of_lower_lanes(pairs, lane), tile = sum_of_lower_lanes(tiles, lane);
  for (int e = lane * experts_of_lane; e < (lane + 1) * experts_of_lane; ++e) {
    const int begin = at;
    for (int s = 0; s < segments; ++s) {
      const int count = counts[s * padded + e];
      counts[s * padded + e] = at;
      at += count;
    }
    if (e < experts) out.start[e] = begin;
    if (e == experts - 1) out.start[experts] = at;
    for (int first = begin; first < at; first += expert_tile_pairs, ++tile) {
      out.tiles[2 * tile] = e;
      out.tiles[2 * tile + 1] = first;
    }
  }
  if (lane == 31) out.tile_count[0] = tile;
}

/// By all threads of a threadgroup. A simdgroup's lanes take 32 experts and one segment of the pairs.
inline void group_pairs(device const int32_t* ids, int pair_count, int experts, Groups out, threadgroup int* counts, ushort lane, ushort simdgroup_index, ushort simdgroups) {
  const int expert_blocks = (experts + 31) / 32, padded = 32 * expert_blocks, segments = max(1, simdgroups / expert_blocks);
  const int segment = (pair_count + segments - 1) / segments;
  for (int unit = simdgroup_index; unit < expert_blocks * segments; unit += simdgroups) {
    const int s = unit / expert_blocks, e = unit % expert_blocks * 32 + lane;
    int count = 0;
    for (int p = s * segment; p < min((s + 1) * segment, pair_count); ++p) count += ids[p] == e ? 1 : 0;
    counts[s * padded + e] = count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup_index == 0) place_groups(counts, segments, padded, experts, out, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int unit = simdgroup_index; unit < expert_blocks * segments; unit += simdgroups) {
    const int s = unit / expert_blocks, e = unit % expert_blocks * 32 + lane;
    int at = counts[s * padded + e];
    for (int p = s * segment; p < min((s + 1) * segment, pair_count); ++p)
      if (ids[p] == e) out.pairs[at++] = p;
  }
}

template <int rows_of_pass, int grouped>
kernel void route(constant RouteArgs& args [[buffer(0)]],
                  device const uint8_t* router [[buffer(1)]],
                  device const float* x [[buffer(2)]],
                  device const int32_t* count [[buffer(3)]],
                  device int32_t* ids [[buffer(4)]],
                  device float* weights [[buffer(5)]],
                  device int32_t* start [[buffer(6)]],
                  device int32_t* pairs [[buffer(7)]],
                  device int32_t* tiles [[buffer(8)]],
                  device int32_t* tile_count [[buffer(9)]],
                  threadgroup uint* memory [[threadgroup(0)]],
                  uint3 group [[threadgroup_position_in_grid]],
                  uint3 groups [[threadgroups_per_grid]],
                  ushort lane [[thread_index_in_simdgroup]],
                  ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
                  ushort simdgroups [[simdgroups_per_threadgroup]]) {
  const int rows = count[0];
  for (int first = int(group.x) * rows_of_pass; first < rows; first += int(groups.x) * rows_of_pass) {
    const int rows_here = min(rows_of_pass, rows - first);
    for (int e = route_experts_of_pass * simdgroup_index; e < args.experts; e += route_experts_of_pass * simdgroups) {
      Products<route_experts_of_pass, rows_of_pass> products;
      set_rows(products, router, args.row_bytes, e, args.experts);
      for (int r = 0; r < rows_of_pass; ++r) products.x[r] = x + ulong(first + min(r, rows_here - 1)) * ulong(args.cols);
      multiply(weight_type_0, products, args.cols, lane);
      if (lane != 0) continue;
      for (int r = 0; r < rows_here; ++r)
        for (int i = 0; i < min(int(route_experts_of_pass), args.experts - e); ++i) memory[r * args.experts + e + i] = as_type<uint>(products.sum[i][r]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = simdgroup_index; r < rows_here; r += simdgroups)
      choose_experts(args, memory + r * args.experts, ids + ulong(first + r) * ulong(args.top_k), weights + ulong(first + r) * ulong(args.top_k), lane);
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  }
  if (!grouped) return;
  Groups out;
  out.start = start;
  out.pairs = pairs;
  out.tiles = tiles;
  out.tile_count = tile_count;
  group_pairs(ids, rows * args.top_k, args.experts, out, (threadgroup int*)memory, lane, simdgroup_index, simdgroups);
}
template [[host_name("route_r1")]] kernel decltype(route<1, 0>) route<1, 0>;
template [[host_name("route_r4")]] kernel decltype(route<4, 0>) route<4, 0>;
template [[host_name("route_and_group_r1")]] kernel decltype(route<1, 1>) route<1, 1>;
template [[host_name("route_and_group_r4")]] kernel decltype(route<4, 1>) route<4, 1>;

kernel void route_group(constant RouteArgs& args [[buffer(0)]],
                        device const int32_t* ids [[buffer(1)]],
                        device const int32_t* count [[buffer(2)]],
                        device int32_t* start [[buffer(3)]],
                        device int32_t* pairs [[buffer(4)]],
                        device int32_t* tiles [[buffer(5)]],
                        device int32_t* tile_count [[buffer(6)]],
                        threadgroup int* memory [[threadgroup(0)]],
                        ushort lane [[thread_index_in_simdgroup]],
                        ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
                        ushort simdgroups [[simdgroups_per_threadgroup]]) {
  Groups out;
  out.start = start;
  out.pairs = pairs;
  out.tiles = tiles;
  out.tile_count = tile_count;
  group_pairs(ids, count[0] * args.top_k, args.experts, out, memory, lane, simdgroup_index, simdgroups);
}
