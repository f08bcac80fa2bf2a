// Which KV blocks each sequence holds: paged, reference-counted, all or none, found again by their tokens. Pure bookkeeping; the contents are
// the backend's.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "backend.h"
#include "prefix_cache.h"

namespace ferrum {

struct Sequence {
  int length = 0;               // committed tokens
  std::vector<int32_t> blocks;  // in order of position; more than the length needs where room was held
};

struct Growth {
  int64_t sequence;
  int tokens;
  const int32_t* ids = nullptr;  // of the tokens, until the step ends; null: unknown, and so never found again
};

/// A beginning of a text that the pool holds: whole blocks, some of them held by live sequences.
struct CachedPrefix {
  int tokens = 0, blocks_in_use = 0;
};

struct PrefixStats {
  int64_t hits = 0, tokens = 0, tokens_asked = 0;  // of `adopt`
  int64_t evictions = 0;                           // cached blocks whose room was needed
};

struct Savepoint {
  int64_t sequence;
  bool live = false;
  int length = 0, blocks = 0;
  int32_t shared = invalid_block;  // the last block, if a fork shares it: kept referenced, as a step may replace it by a copy
};

/// Blocks of kv_block_tokens tokens. A step is grow -> (the backend writes) -> commit or rollback. Every call either does all of what it says
/// or throws and changes nothing but what is cached. A block that is whole and committed is registered by its tokens, and stays so, free or
/// not, until it is written again or its room is needed; so all of a sequence's blocks past its length but the first are unregistered.
class KvPool {
 public:
  KvPool(int blocks, int max_sequences, int context_length, bool prefix_cache);

  /// Gives each sequence room for its tokens, starting those not yet live, and replaces a last block shared with a fork that would be
  /// written. `copies` are the block contents to copy before the step writes. Throws KvPoolExhausted or ContextFull.
  void grow(std::span<const Growth> step, std::vector<BlockCopy>& copies);
  void commit();
  void rollback();

  /// As `grow`, but `commit` leaves the length as it is: the room is held until release.
  void hold(int64_t sequence, int tokens, std::vector<BlockCopy>& copies);
  void fork(int64_t source, int64_t target);
  /// Starts a sequence with the longest cached beginning of `tokens`, and returns its length: where that is 0 the sequence is not started.
  int adopt(int64_t sequence, std::span<const int32_t> tokens);
  /// What `adopt` would find.
  CachedPrefix cached_prefix(std::span<const int32_t> tokens) const;
  void release(int64_t sequence);
  /// As `release`, but what only this sequence holds is not found again.
  void discard(int64_t sequence);
  /// Drops the tokens after the first `length`, and the room held beyond them. True: others hold the last block too, and the next write takes
  /// one block more; where it is false that stays so, as nobody finds a block that is cut.
  bool truncate(int64_t sequence, int length);
  /// Releases every sequence and forgets what is cached.
  void reset();

  /// Remembers a sequence, live or not, before steps that may have to be taken back together; ends with `restore` or `forget`.
  Savepoint save(int64_t sequence);
  void restore(const Savepoint&);
  void forget(const Savepoint&);

  bool live(int64_t sequence) const { return sequences_.count(sequence) != 0; }
  const Sequence& at(int64_t sequence) const;
  int live_sequences() const { return static_cast<int>(sequences_.size()); }
  int total_blocks() const { return static_cast<int>(references_.size()); }
  /// Blocks that no sequence holds, the cached ones too.
  int free_blocks() const { return static_cast<int>(free_.size()) + cached_blocks(); }
  /// Free blocks whose content is found again.
  int cached_blocks() const { return cache_.unused(); }
  const PrefixStats& prefix_stats() const { return prefix_stats_; }
  /// Block tables that hold the block.
  int references(int32_t block) const { return references_[static_cast<size_t>(block)]; }
  /// Blocks whose content was dropped since the last call, as they became free or as their room was needed (for poisoning in tests).
  std::vector<int32_t> take_freed();
  void track_freed() { track_freed_ = true; }

 private:
  struct Undo {
    Growth growth;
    bool started;
    size_t blocks;       // before the step
    int replaced = -1;   // index of a copied block, and what stood there
    int32_t original = 0;
  };
  void check_context(int64_t sequence, int length, int tokens) const;
  void check_room(const Growth& subject, int need, int starting) const;
  void grow_one(const Growth&, std::vector<BlockCopy>& copies);
  /// Back to an earlier length; blocks beyond the first `blocks` go back to the pool.
  void shorten(Sequence& sequence, int length, int blocks);
  /// Notes the tokens that a step has appended, and registers the blocks that they complete.
  void note_tokens(const Sequence& sequence, const Growth& growth);
  int32_t take_block();
  void drop_block(int32_t block);
  void free_block(int32_t block);
  template <class Visit>
  int walk_cached(std::span<const int32_t> tokens, Visit visit) const;
  void append_blocks(Sequence& sequence, size_t count);
  int first_written(const Sequence& sequence) const { return sequence.length / kv_block_tokens; }
  bool must_copy(const Sequence& sequence) const;

  int max_sequences_, context_length_;
  bool caches_;
  PrefixCache cache_;
  PrefixStats prefix_stats_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::vector<int32_t> free_;        // a stack of those that hold nothing
  std::vector<int32_t> references_;  // per block
  std::vector<Undo> undo_;           // of the step that is under way
  std::vector<int32_t> freed_;
  bool track_freed_ = false;
};

inline int blocks_for(int tokens) { return tokens / kv_block_tokens + (tokens % kv_block_tokens != 0); }

}  // namespace ferrum
