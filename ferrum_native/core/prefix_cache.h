// Which KV blocks hold which beginning of a text, so that a text that begins so takes them instead of computing them anew.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "batch.h"

namespace ferrum {

/// Names a beginning of a text that is made of whole blocks; given once, never again. 0: the empty beginning.
using PrefixId = uint64_t;

/// What every block of a pool holds. A registered block is found again by (prefix before it, its tokens), compared exactly: a hash only finds
/// the bucket. The unused ones, which no sequence holds, stand in the order in which they are given up. Allocates at construction only.
class PrefixCache {
 public:
  explicit PrefixCache(int blocks);

  /// The block registered for these kv_block_tokens tokens behind `before`, or invalid_block.
  int32_t find(PrefixId before, const int32_t* tokens) const;
  /// The text up to the end of a block; 0: the block is not whole, or nothing is known of it.
  PrefixId prefix(int32_t block) const { return at(block).prefix; }
  bool registered(int32_t block) const { return at(block).registered; }

  /// Tokens are noted as they are committed; a negative one is unknown and keeps its block from being registered.
  void note_token(int32_t block, int offset, int32_t token) { at(block).tokens[static_cast<size_t>(offset)] = token; }
  void copy_tokens(int32_t from, int32_t to) { at(to).tokens = at(from).tokens; }
  /// All tokens of a block are noted, and `before` is what precedes them: registers it, unless another block holds the same.
  void complete(int32_t block, PrefixId before);
  /// The content of a block is no longer what was registered. It is not unused.
  void forget(int32_t block);

  /// No sequence holds a registered block any more: it is the last to be given up.
  void retire(int32_t block);
  /// A sequence holds an unused block again.
  void revive(int32_t block);
  /// Gives up the unused block that has been so for longest; there is one.
  int32_t evict();
  int unused() const { return unused_; }

 private:
  struct Entry {
    std::array<int32_t, kv_block_tokens> tokens{};
    PrefixId before = 0, prefix = 0;
    bool registered = false;
    int32_t next = invalid_block;             // in the bucket
    int32_t older = invalid_block, newer = invalid_block;  // among the unused
  };
  Entry& at(int32_t block) { return entries_[static_cast<size_t>(block)]; }
  const Entry& at(int32_t block) const { return entries_[static_cast<size_t>(block)]; }
  size_t bucket(PrefixId before, const int32_t* tokens) const;

  std::vector<Entry> entries_;    // per block
  std::vector<int32_t> buckets_;  // first block of each; a power of two
  int32_t oldest_ = invalid_block, newest_ = invalid_block;
  int unused_ = 0;
  PrefixId last_ = 0;
};

}  // namespace ferrum
