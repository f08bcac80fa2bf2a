#include "kv_pool.h"

#include <algorithm>
#include <string>
#include <utility>

namespace ferrum {

KvPool::KvPool(int blocks, int max_sequences, int context_length, bool prefix_cache)
    : max_sequences_(max_sequences), context_length_(context_length), caches_(prefix_cache), cache_(blocks), references_(static_cast<size_t>(blocks), 0) {
  for (int32_t block = blocks; block-- > 0;) free_.push_back(block);
  undo_.reserve(static_cast<size_t>(max_sequences));
}

const Sequence& KvPool::at(int64_t sequence) const {
  auto found = sequences_.find(sequence);
  if (found == sequences_.end())
    throw Error(ErrorKind::UnknownSequence, "sequence " + std::to_string(sequence) + " is not live: it was never started with prefill, or was released.");
  return found->second;
}

void KvPool::check_context(int64_t sequence, int length, int tokens) const {
  if (tokens <= context_length_ - length) return;
  throw Error(ErrorKind::ContextFull, "sequence " + std::to_string(sequence) + " has " + std::to_string(length) + " tokens and would grow by " + std::to_string(tokens) +
                                          ", but the model's context length is " + std::to_string(context_length_) + ". Shorten the prompt or release the sequence.");
}

void KvPool::check_room(const Growth& subject, int need, int starting) const {
  if (live_sequences() + starting > max_sequences_)
    throw Error(ErrorKind::KvPoolExhausted, "sequence " + std::to_string(subject.sequence) + " would be one more than max_sequences=" + std::to_string(max_sequences_) +
                                                " live sequences. Release a sequence or raise max_sequences.");
  if (need <= free_blocks()) return;
  throw Error(ErrorKind::KvPoolExhausted, "need " + std::to_string(need) + (need == 1 ? " block" : " blocks") + " for sequence " + std::to_string(subject.sequence) + ", " + std::to_string(free_blocks()) + " are free (" +
                                              std::to_string(total_blocks()) + " blocks of " + std::to_string(kv_block_tokens) + " tokens). Release a sequence or raise kv_tokens.");
}

int32_t KvPool::take_block() {
  int32_t block;
  if (free_.empty()) {
    block = cache_.evict();
    ++prefix_stats_.evictions;
    if (track_freed_) freed_.push_back(block);
  } else {
    block = free_.back();
    free_.pop_back();
  }
  references_[static_cast<size_t>(block)] = 1;
  return block;
}

void KvPool::drop_block(int32_t block) {
  if (--references_[static_cast<size_t>(block)] > 0) return;
  if (cache_.registered(block))
    cache_.retire(block);
  else
    free_block(block);
}

void KvPool::free_block(int32_t block) {
  cache_.forget(block);
  free_.push_back(block);
  if (track_freed_) freed_.push_back(block);
}

void KvPool::append_blocks(Sequence& sequence, size_t count) {
  sequence.blocks.reserve(count);
  while (sequence.blocks.size() < count) sequence.blocks.push_back(take_block());
}

bool KvPool::must_copy(const Sequence& sequence) const {
  auto index = static_cast<size_t>(first_written(sequence));
  return index < sequence.blocks.size() && references_[static_cast<size_t>(sequence.blocks[index])] > 1;
}

void KvPool::grow(std::span<const Growth> step, std::vector<BlockCopy>& copies) {
  int need = 0, starting = 0;
  for (const Growth& growth : step) {
    auto found = sequences_.find(growth.sequence);
    const Sequence empty, &sequence = found == sequences_.end() ? empty : found->second;
    check_context(growth.sequence, sequence.length, growth.tokens);
    starting += found == sequences_.end();
    need += std::max(0, blocks_for(sequence.length + growth.tokens) - static_cast<int>(sequence.blocks.size())) + must_copy(sequence);
    check_room(growth, need, starting);
  }
  copies.clear();
  undo_.clear();
  copies.reserve(step.size());
  undo_.reserve(step.size());
  try {
    for (const Growth& growth : step) grow_one(growth, copies);
  } catch (...) {
    rollback();
    throw;
  }
}

void KvPool::grow_one(const Growth& growth, std::vector<BlockCopy>& copies) {
  auto [entry, started] = sequences_.try_emplace(growth.sequence);
  Sequence& sequence = entry->second;
  Undo& undo = undo_.emplace_back(Undo{growth, started, sequence.blocks.size()});
  const auto first = static_cast<size_t>(first_written(sequence));
  if (must_copy(sequence)) {
    undo.replaced = first_written(sequence);
    int32_t& block = sequence.blocks[static_cast<size_t>(undo.replaced)];
    undo.original = block;
    block = take_block();
    cache_.copy_tokens(undo.original, block);
    copies.push_back({undo.original, block});
  } else if (first < sequence.blocks.size()) {
    cache_.forget(sequence.blocks[first]);
  }
  append_blocks(sequence, std::max(sequence.blocks.size(), static_cast<size_t>(blocks_for(sequence.length + growth.tokens))));
}

void KvPool::commit() {
  for (const Undo& undo : undo_) {
    Sequence& sequence = sequences_.at(undo.growth.sequence);
    if (caches_) note_tokens(sequence, undo.growth);
    sequence.length += undo.growth.tokens;
    if (undo.replaced >= 0) drop_block(undo.original);
  }
  undo_.clear();
}

void KvPool::note_tokens(const Sequence& sequence, const Growth& growth) {
  for (int i = 0; i < growth.tokens; ++i) {
    const int position = sequence.length + i, offset = position % kv_block_tokens;
    const auto index = static_cast<size_t>(position / kv_block_tokens);
    const int32_t block = sequence.blocks[index];
    cache_.note_token(block, offset, growth.ids ? growth.ids[i] : -1);
    if (offset + 1 < kv_block_tokens) continue;
    const PrefixId before = index > 0 ? cache_.prefix(sequence.blocks[index - 1]) : 0;
    if (index == 0 || before != 0) cache_.complete(block, before);
  }
}

void KvPool::rollback() {
  for (const Undo& undo : undo_) {
    Sequence& sequence = sequences_.at(undo.growth.sequence);
    while (sequence.blocks.size() > undo.blocks) {
      drop_block(sequence.blocks.back());
      sequence.blocks.pop_back();
    }
    if (undo.replaced >= 0) {
      drop_block(sequence.blocks[static_cast<size_t>(undo.replaced)]);
      sequence.blocks[static_cast<size_t>(undo.replaced)] = undo.original;
    }
    if (undo.started) sequences_.erase(undo.growth.sequence);
  }
  undo_.clear();
}

void KvPool::hold(int64_t id, int tokens, std::vector<BlockCopy>& copies) {
  const Growth growth[] = {{id, tokens}};
  grow(growth, copies);
  undo_.front().growth.tokens = 0;
}

void KvPool::fork(int64_t source, int64_t target) {
  const Sequence& from = at(source);
  if (live(target))
    throw Error(ErrorKind::InvalidArgument, "sequence " + std::to_string(target) + " is live already and cannot be the target of a fork. Release it first or choose another number.");
  check_room({target, 0}, 0, 1);
  Sequence copy{from.length, {from.blocks.begin(), from.blocks.begin() + blocks_for(from.length)}};
  const Sequence& to = sequences_.emplace(target, std::move(copy)).first->second;
  for (int32_t block : to.blocks) ++references_[static_cast<size_t>(block)];
}

/// Calls visit(block) for each block of the longest cached beginning, and returns how many there are.
template <class Visit>
int KvPool::walk_cached(std::span<const int32_t> tokens, Visit visit) const {
  PrefixId before = 0;
  int blocks = 0;
  for (; tokens.size() >= kv_block_tokens; tokens = tokens.subspan(kv_block_tokens), ++blocks) {
    const int32_t block = cache_.find(before, tokens.data());
    if (block == invalid_block) break;
    visit(block);
    before = cache_.prefix(block);
  }
  return blocks;
}

CachedPrefix KvPool::cached_prefix(std::span<const int32_t> tokens) const {
  CachedPrefix found;
  found.tokens = kv_block_tokens * walk_cached(tokens, [&](int32_t block) { found.blocks_in_use += references(block) > 0; });
  return found;
}

int KvPool::adopt(int64_t id, std::span<const int32_t> tokens) {
  if (live(id))
    throw Error(ErrorKind::InvalidArgument, "sequence " + std::to_string(id) + " is live already and cannot take a cached beginning. Release it first or choose another number.");
  Sequence sequence;
  sequence.length = kv_block_tokens * walk_cached(tokens, [&](int32_t block) { sequence.blocks.push_back(block); });
  const int length = sequence.length;
  if (length > 0) {
    check_room({id, 0}, 0, 1);
    for (int32_t block : sequences_.emplace(id, std::move(sequence)).first->second.blocks)
      if (references_[static_cast<size_t>(block)]++ == 0) cache_.revive(block);
    ++prefix_stats_.hits;
  }
  prefix_stats_.tokens += length;
  prefix_stats_.tokens_asked += static_cast<int64_t>(tokens.size());
  return length;
}

void KvPool::release(int64_t id) {
  at(id);
  auto entry = sequences_.extract(id);
  std::vector<int32_t>& blocks = entry.mapped().blocks;
  for (; !blocks.empty(); blocks.pop_back()) drop_block(blocks.back());  // the beginning is the last to be given up
}

void KvPool::discard(int64_t id) {
  for (int32_t block : at(id).blocks)
    if (references(block) == 1) cache_.forget(block);
  release(id);
}

void KvPool::reset() {
  while (!sequences_.empty()) release(sequences_.begin()->first);
  while (cache_.unused() > 0) free_block(cache_.evict());
}

bool KvPool::truncate(int64_t id, int length) {
  const int current = at(id).length;
  if (length < 1 || length > current)
    throw Error(ErrorKind::InvalidArgument, "sequence " + std::to_string(id) + " has " + std::to_string(current) + " tokens and cannot be cut to " + std::to_string(length) +
                                                ": the length is from 1 to what it has. To drop all of them, release it.");
  // Every block past the new length goes, held room too: a fork may share it, and only the first block written is looked at for a copy.
  Sequence& sequence = sequences_.at(id);
  shorten(sequence, length, blocks_for(length));
  if (length % kv_block_tokens == 0) return false;
  if (must_copy(sequence)) return true;
  cache_.forget(sequence.blocks.back());
  return false;
}

void KvPool::shorten(Sequence& sequence, int length, int blocks) {
  sequence.length = length;
  while (static_cast<int>(sequence.blocks.size()) > blocks) {
    drop_block(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
}

Savepoint KvPool::save(int64_t id) {
  Savepoint savepoint{id};
  auto found = sequences_.find(id);
  if (found == sequences_.end()) return savepoint;
  const Sequence& sequence = found->second;
  savepoint.live = true;
  savepoint.length = sequence.length;
  savepoint.blocks = static_cast<int>(sequence.blocks.size());
  if (must_copy(sequence)) {
    savepoint.shared = sequence.blocks[static_cast<size_t>(first_written(sequence))];
    ++references_[static_cast<size_t>(savepoint.shared)];
  }
  return savepoint;
}

void KvPool::restore(const Savepoint& savepoint) {
  if (!savepoint.live && live(savepoint.sequence)) discard(savepoint.sequence);
  if (savepoint.live) {
    Sequence& sequence = sequences_.at(savepoint.sequence);
    for (auto i = static_cast<size_t>(savepoint.length / kv_block_tokens); i < sequence.blocks.size(); ++i)
      if (sequence.blocks[i] != savepoint.shared) cache_.forget(sequence.blocks[i]);
    shorten(sequence, savepoint.length, savepoint.blocks);
  }
  if (savepoint.shared == invalid_block) return;
  int32_t& block = sequences_.at(savepoint.sequence).blocks[static_cast<size_t>(savepoint.length / kv_block_tokens)];
  drop_block(std::exchange(block, savepoint.shared));
}

void KvPool::forget(const Savepoint& savepoint) {
  if (savepoint.shared != invalid_block) drop_block(savepoint.shared);
}

std::vector<int32_t> KvPool::take_freed() { return std::exchange(freed_, {}); }

}  // namespace ferrum
