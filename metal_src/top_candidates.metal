// top_candidates: the n largest of a row by a radix selection: the key of the n-th is found digit by digit from counts of digits, then everything
// above it is collected and sorted. A threadgroup takes a row, or a segment of it. Counts come in any order, results do not.
#include "rows.h"
#include "shared/top_candidates.h"

using namespace ferrum;
using namespace ferrum::shared;

enum { digit_values = 256, no_candidate = 0x7fffffff, ids_below = 1 << 24 };

// Edits. Those of one logit are neighbours; the thread of the first applies them all.

inline bool starts_logit(device const CandidateEdit* edits, int i) { return i == 0 || edits[i - 1].row != edits[i].row || edits[i - 1].token != edits[i].token; }
inline ulong logit_of(device const CandidateEdit* edits, int i, int vocab) { return ulong(edits[i].row) * ulong(vocab) + ulong(edits[i].token); }

kernel void top_candidates_edit(constant TopCandidatesArgs& args [[buffer(0)]],
                                device const CandidateEdit* edits [[buffer(1)]],
                                device float* logits [[buffer(2)]],
                                device float* saved [[buffer(3)]],
                                uint3 position [[thread_position_in_grid]]) {
  const int first = int(position.x);
  if (first >= args.items || !starts_logit(edits, first)) return;
  const ulong at = logit_of(edits, first, args.vocab);
  float logit = logits[at];
  saved[first] = logit;
  int i = first;
  do {
    logit = logit > 0.0f ? precise::divide(logit, edits[i].penalty) : logit * edits[i].penalty;
    logit += edits[i].bias;
    ++i;
  } while (i < args.items && !starts_logit(edits, i));
  logits[at] = logit;
}

kernel void top_candidates_restore(constant TopCandidatesArgs& args [[buffer(0)]],
                                   device const CandidateEdit* edits [[buffer(1)]],
                                   device float* logits [[buffer(2)]],
                                   device const float* saved [[buffer(3)]],
                                   uint3 position [[thread_position_in_grid]]) {
  const int i = int(position.x);
  if (i < args.items && starts_logit(edits, i)) logits[logit_of(edits, i, args.vocab)] = saved[i];
}

kernel void top_candidates_targets(constant TopCandidatesArgs& args [[buffer(0)]],
                                   device const int32_t* rows [[buffer(1)]],
                                   device const int32_t* ids [[buffer(2)]],
                                   device const float* logits [[buffer(3)]],
                                   device float* out [[buffer(4)]],
                                   uint3 position [[thread_position_in_grid]]) {
  const int i = int(position.x);
  if (i < args.items) out[i] = logits[ulong(rows[i]) * ulong(args.vocab) + ulong(ids[i])];
}

inline bool is_excluded(device const uint* excluded, int id) { return ((excluded[id / 32] >> (id % 32)) & 1) != 0; }

// A threadgroup sums a chunk of a row; a thread takes every 256th logit of it.
kernel void top_candidates_sums(constant TopCandidatesArgs& args [[buffer(0)]],
                                device const float* logits [[buffer(1)]],
                                device const uint* excluded [[buffer(2)]],
                                device const float* temperatures [[buffer(3)]],
                                device float* sums [[buffer(4)]],
                                threadgroup float* memory [[threadgroup(0)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint3 groups [[threadgroups_per_grid]],
                                ushort thread_index [[thread_index_in_threadgroup]],
                                ushort lane [[thread_index_in_simdgroup]],
                                ushort simdgroup_index [[simdgroup_index_in_threadgroup]],
                                ushort simdgroups [[simdgroups_per_threadgroup]]) {
  const int begin = int(group.x) * candidates_sum_chunk, end = min(begin + int(candidates_sum_chunk), args.vocab);
  device const float* row = logits + ulong(group.y) * ulong(args.vocab);
  float largest = -INFINITY;
  int numbers = 0, nans = 0;
  for (int i = begin + thread_index; i < end; i += candidates_sum_threads) {
    if (is_excluded(excluded, i)) continue;
    const float logit = row[i];
    nans += is_nan(logit) ? 1 : 0;
    numbers += ordered_key(logit) > key_of_nothing ? 1 : 0;
    largest = max(largest, logit);
  }
  largest = simd_max(largest);
  if (lane == 0) memory[32 + simdgroup_index] = largest;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < simdgroups; ++s) largest = max(largest, memory[32 + s]);
  const float inverse = 1.0f / temperatures[group.y];
  float plain = 0.0f, scaled = 0.0f;
  for (int i = begin + thread_index; i < end; i += candidates_sum_threads) {
    if (is_excluded(excluded, i) || ordered_key(row[i]) == key_of_nothing) continue;
    const float below = row[i] - largest;
    plain += exp_below_zero(below);
    scaled += exp_below_zero(below * inverse);
  }
  plain = sum_of_threadgroup(plain, memory, lane, simdgroup_index, simdgroups);
  scaled = sum_of_threadgroup(scaled, memory, lane, simdgroup_index, simdgroups);
  const float all_numbers = sum_of_threadgroup(float(numbers), memory, lane, simdgroup_index, simdgroups);
  const float all_nans = sum_of_threadgroup(float(nans), memory, lane, simdgroup_index, simdgroups);
  if (thread_index != 0) return;
  device float* out = sums + 4 * (ulong(group.y) * ulong(groups.x) + ulong(group.x));
  out[0] = largest;
  out[1] = all_nans > 0.0f ? as_type<float>(0x7fc00000u) : plain;
  out[2] = all_nans > 0.0f ? as_type<float>(0x7fc00000u) : scaled;
  out[3] = all_numbers;
}

// Selection.

/// What is selected from: logits with their ids, or a list of keys and ids. Key 0: not there.
struct LogitSource {
  device const float* logits;  // of id 0
  device const uint* excluded;
  int first;  // id
};
inline int id_at(LogitSource source, int i) { return source.first + i; }
inline uint key_at(LogitSource source, int i) { return is_excluded(source.excluded, source.first + i) ? 0u : ordered_key(source.logits[source.first + i]); }

struct ListSource {
  device const uint* keys;
  device const int32_t* ids;
};
inline int id_at(ListSource source, int i) { return source.ids[i]; }
inline uint key_at(ListSource source, int i) { return source.keys[i]; }

struct GroupThread {
  ushort index, lane, simdgroup_index;
};

/// Threadgroup memory of a selection, in words.
enum {
  memory_of_digits = 0,                 // counts of each digit
  memory_of_found = digit_values,       // what find_digit found: digit, number above it, number in it, number of all
  memory_of_collected = memory_of_found + 4,
  memory_of_list = 512                  // keys, then ids
};
static_assert(4 * memory_of_list + 8 * candidates_sort_in_group == candidates_threadgroup_bytes, "the host reserves what the kernels use");

/// By one simdgroup: the digit, from the highest down, that holds the `wanted`th. A lane takes 8 digits.
inline void find_digit(threadgroup uint* memory, int wanted, ushort lane) {
  threadgroup atomic_uint* counts = (threadgroup atomic_uint*)memory + (digit_values - 8 - 8 * lane);
  int here = 0;
  for (int i = 0; i < 8; ++i) here += int(atomic_load_explicit(counts + i, memory_order_relaxed));
  int above = sum_of_lower_lanes(here, lane);
  if (lane == 31) memory[memory_of_found + 3] = uint(above + here);
  if (above >= wanted || above + here < wanted) return;
  int i = 7, count = 0;
  for (; i >= 0; --i) {
    count = int(atomic_load_explicit(counts + i, memory_order_relaxed));
    if (above + count >= wanted) break;
    above += count;
  }
  memory[memory_of_found] = uint(digit_values - 8 - 8 * lane + i);
  memory[memory_of_found + 1] = uint(above);
  memory[memory_of_found + 2] = uint(count);
}

/// The `wanted` largest of a set of numbers are those above `limit`, and of those equal to it `wanted_equal` of `equal`.
struct Limit {
  uint limit;
  int wanted_equal, equal, all;
};

/// Which numbers a search is over: the keys of a source, or (as ids are wanted from the lowest up) the complements of the ids that have one key.
struct Search {
  int highest_shift;
  uint key;  // 0: the keys themselves
};
template <typename Source> inline uint number_at(Source source, Search search, int i) {
  const uint key = key_at(source, i);
  return search.key == 0 ? key : key == search.key ? uint(ids_below) + uint(ids_below - 1 - id_at(source, i)) : 0u;
}

/// Numbers that are 0 are not there. `all` is right in any case; the rest where it is at least `wanted`.
template <typename Source>
inline Limit find_limit(Source source, int size, int wanted, Search search, threadgroup uint* memory, GroupThread thread_) {
  threadgroup atomic_uint* counts = (threadgroup atomic_uint*)memory;
  const uint known = search.key == 0 ? 0u : uint(ids_below);
  Limit found;
  found.limit = known;
  found.wanted_equal = wanted;
  for (int shift = search.highest_shift; shift >= 0; shift -= 8) {
    for (int i = thread_.index; i < digit_values; i += candidates_threads) atomic_store_explicit(counts + i, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_.index; i < size; i += candidates_threads) {
      const uint number = number_at(source, search, i);
      const bool candidate = number != 0 && (shift == search.highest_shift || (number >> (shift + 8)) == (found.limit >> (shift + 8)));
      if (candidate) atomic_fetch_add_explicit(counts + ((number >> shift) & 255u), 1u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_.simdgroup_index == 0) find_digit(memory, found.wanted_equal, thread_.lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (shift == search.highest_shift) {
      found.all = int(memory[memory_of_found + 3]);
      if (found.all < wanted) break;  // every thread
    }
    found.limit |= memory[memory_of_found] << shift;
    found.wanted_equal -= int(memory[memory_of_found + 1]);
    found.equal = int(memory[memory_of_found + 2]);
  }
  return found;
}

/// Whether candidate a comes before b.
inline bool comes_first(uint key_a, int id_a, uint key_b, int id_b) { return key_a > key_b || (key_a == key_b && id_a < id_b); }

template <typename Keys, typename Ids> inline void order_two(Keys keys, Ids ids, int a, int b) {
  if (!comes_first(keys[b], ids[b], keys[a], ids[a])) return;
  const uint key = keys[a];
  const int id = ids[a];
  keys[a] = keys[b];
  ids[a] = ids[b];
  keys[b] = key;
  ids[b] = id;
}

/// Bitonic sort whose comparisons all point one way, so that what a power of two lacks can be thought behind the end.
template <typename Keys, typename Ids> inline void sort_candidates(Keys keys, Ids ids, int size, ushort thread_index) {
  int whole = 1;
  while (whole < size) whole *= 2;
  for (int run = 2; run <= whole; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = thread_index; pair < whole / 2; pair += candidates_threads) {
        const int block = pair / stride * 2 * stride, place = pair % stride;
        const int a = block + place, b = stride == run / 2 ? block + 2 * stride - 1 - place : a + stride;
        if (b < size) order_two(keys, ids, a, b);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    }
}

/// The `wanted` largest in any order; behind them candidates that are none where there are fewer.
template <typename Source>
inline void collect_largest(Source source, int size, int wanted, device uint* keys, device int32_t* ids, threadgroup uint* memory, GroupThread thread_) {
  const Search by_key = {24, 0u};
  const Limit limit = find_limit(source, size, wanted, by_key, memory, thread_);
  const bool take_all = limit.all <= wanted;
  int last_id = ids_below;  // of those equal to the limit
  if (!take_all && limit.wanted_equal < limit.equal) {
    const Search by_id = {16, limit.limit};
    last_id = ids_below - 1 - int(find_limit(source, size, limit.wanted_equal, by_id, memory, thread_).limit - uint(ids_below));
  }
  threadgroup atomic_uint* collected = (threadgroup atomic_uint*)memory + memory_of_collected;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_.index == 0) atomic_store_explicit(collected, 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_.index; i < size; i += candidates_threads) {
    const uint key = key_at(source, i);
    if (key == 0 || (!take_all && (key < limit.limit || (key == limit.limit && id_at(source, i) > last_id)))) continue;
    const uint at = atomic_fetch_add_explicit(collected, 1u, memory_order_relaxed);
    keys[at] = key;
    ids[at] = id_at(source, i);
  }
  for (int i = limit.all + thread_.index; i < wanted; i += candidates_threads) {
    keys[i] = 0;
    ids[i] = no_candidate;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
}

/// The `wanted` largest in order, with their logits in place of keys.
template <typename Source>
inline void select_largest(Source source, int size, int wanted, device const float* logits, device uint* values, device int32_t* ids, threadgroup uint* memory,
                           GroupThread thread_) {
  collect_largest(source, size, wanted, values, ids, memory, thread_);
  if (wanted <= candidates_sort_in_group) {
    threadgroup uint* list_keys = memory + memory_of_list;
    threadgroup int* list_ids = (threadgroup int*)(list_keys + candidates_sort_in_group);
    for (int i = thread_.index; i < wanted; i += candidates_threads) {
      list_keys[i] = values[i];
      list_ids[i] = ids[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_candidates(list_keys, list_ids, wanted, thread_.index);
    for (int i = thread_.index; i < wanted; i += candidates_threads) {
      values[i] = list_keys[i];
      ids[i] = list_ids[i];
    }
  } else {
    sort_candidates(values, ids, wanted, thread_.index);
  }
  for (int i = thread_.index; i < wanted; i += candidates_threads) values[i] = values[i] <= key_of_nothing ? 0xff800000u : as_type<uint>(logits[ids[i]]);
}

kernel void top_candidates_filter(constant TopCandidatesArgs& args [[buffer(0)]],
                                  device const float* logits [[buffer(1)]],
                                  device const uint* excluded [[buffer(2)]],
                                  device uint* keys [[buffer(3)]],
                                  device int32_t* ids [[buffer(4)]],
                                  threadgroup uint* memory [[threadgroup(0)]],
                                  uint3 group [[threadgroup_position_in_grid]],
                                  ushort thread_index [[thread_index_in_threadgroup]],
                                  ushort lane [[thread_index_in_simdgroup]],
                                  ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const GroupThread thread_ = {thread_index, lane, simdgroup_index};
  const int first = int(group.x) * candidates_segment;
  const LogitSource source = {logits + ulong(group.y) * ulong(args.vocab), excluded, first};
  const ulong at = (ulong(group.y) * ulong(args.segments) + ulong(group.x)) * ulong(args.count);
  collect_largest(source, min(int(candidates_segment), args.vocab - first), args.count, keys + at, ids + at, memory, thread_);
}

kernel void top_candidates_merge(constant TopCandidatesArgs& args [[buffer(0)]],
                                 device const uint* keys [[buffer(1)]],
                                 device const int32_t* ids [[buffer(2)]],
                                 device const float* logits [[buffer(3)]],
                                 device uint* out_values [[buffer(4)]],
                                 device int32_t* out_ids [[buffer(5)]],
                                 threadgroup uint* memory [[threadgroup(0)]],
                                 uint3 group [[threadgroup_position_in_grid]],
                                 ushort thread_index [[thread_index_in_threadgroup]],
                                 ushort lane [[thread_index_in_simdgroup]],
                                 ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const GroupThread thread_ = {thread_index, lane, simdgroup_index};
  const int size = args.segments * args.count;
  const ListSource source = {keys + ulong(group.x) * ulong(size), ids + ulong(group.x) * ulong(size)};
  const ulong at = ulong(group.x) * ulong(args.count);
  select_largest(source, size, args.count, logits + ulong(group.x) * ulong(args.vocab), out_values + at, out_ids + at, memory, thread_);
}

kernel void top_candidates_select(constant TopCandidatesArgs& args [[buffer(0)]],
                                  device const float* logits [[buffer(1)]],
                                  device const uint* excluded [[buffer(2)]],
                                  device uint* out_values [[buffer(3)]],
                                  device int32_t* out_ids [[buffer(4)]],
                                  threadgroup uint* memory [[threadgroup(0)]],
                                  uint3 group [[threadgroup_position_in_grid]],
                                  ushort thread_index [[thread_index_in_threadgroup]],
                                  ushort lane [[thread_index_in_simdgroup]],
                                  ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  const GroupThread thread_ = {thread_index, lane, simdgroup_index};
  device const float* row = logits + ulong(group.x) * ulong(args.vocab);
  const LogitSource source = {row, excluded, 0};
  const ulong at = ulong(group.x) * ulong(args.count);
  select_largest(source, args.vocab, args.count, row, out_values + at, out_ids + at, memory, thread_);
}
