#include "prefix_cache.h"

#include <algorithm>
#include <bit>

namespace ferrum {

PrefixCache::PrefixCache(int blocks) : entries_(static_cast<size_t>(blocks)), buckets_(std::bit_ceil(static_cast<size_t>(blocks)), invalid_block) {}

size_t PrefixCache::bucket(PrefixId before, const int32_t* tokens) const {
  uint64_t hash = before;
  for (int i = 0; i < kv_block_tokens; ++i) {
    hash = (hash ^ static_cast<uint32_t>(tokens[i])) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return hash & (buckets_.size() - 1);
}

int32_t PrefixCache::find(PrefixId before, const int32_t* tokens) const {
  int32_t block = buckets_[bucket(before, tokens)];
  while (block != invalid_block && !(at(block).before == before && std::equal(at(block).tokens.begin(), at(block).tokens.end(), tokens))) block = at(block).next;
  return block;
}

void PrefixCache::complete(int32_t block, PrefixId before) {
  Entry& entry = at(block);
  const int32_t* tokens = entry.tokens.data();
  if (std::any_of(entry.tokens.begin(), entry.tokens.end(), [](int32_t token) { return token < 0; })) return;
  const int32_t same = find(before, tokens);
  if (same != invalid_block) {
    entry.prefix = at(same).prefix;
    return;
  }
  int32_t& first = buckets_[bucket(before, tokens)];
  entry.before = before;
  entry.prefix = ++last_;
  entry.registered = true;
  entry.next = first;
  first = block;
}

void PrefixCache::forget(int32_t block) {
  Entry& entry = at(block);
  entry.prefix = 0;
  if (!entry.registered) return;
  entry.registered = false;
  int32_t* link = &buckets_[bucket(entry.before, entry.tokens.data())];
  while (*link != block) link = &at(*link).next;
  *link = entry.next;
}

void PrefixCache::retire(int32_t block) {
  Entry& entry = at(block);
  entry.older = newest_;
  entry.newer = invalid_block;
  (newest_ == invalid_block ? oldest_ : at(newest_).newer) = block;
  newest_ = block;
  ++unused_;
}

void PrefixCache::revive(int32_t block) {
  const Entry& entry = at(block);
  (entry.older == invalid_block ? oldest_ : at(entry.older).newer) = entry.newer;
  (entry.newer == invalid_block ? newest_ : at(entry.newer).older) = entry.older;
  --unused_;
}

int32_t PrefixCache::evict() {
  const int32_t block = oldest_;
  revive(block);
  forget(block);
  return block;
}

}  // namespace ferrum
