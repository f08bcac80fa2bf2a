// Which KV blocks each sequence holds: paged, reference-counted, all or none. Pure bookkeeping; the contents are the backend's.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "backend.h"

namespace ferrum {

struct Sequence {
  int length = 0;               // committed tokens
  std::vector<int32_t> blocks;  // in order of position; more than the length needs where room was held
};

struct Growth {
  int64_t sequence;
  int tokens;
};

struct Savepoint {
  int64_t sequence;
  bool live = false;
  int length = 0, blocks = 0;
  int32_t shared = invalid_block;  // the last block, if a fork shares it: kept referenced, as a step may replace it by a copy
};

/// Blocks of kv_block_tokens tokens. A step is grow -> (the backend writes) -> commit or rollback. Every call either does all of what it says
/// or throws and changes nothing.
class KvPool {
 public:
  KvPool(int blocks, int max_sequences, int context_length);

  /// Gives each sequence room for its tokens, starting those not yet live, and replaces a last block shared with a fork that would be
  /// written. `copies` are the block contents to copy before the step writes. Throws KvPoolExhausted or ContextFull.
  void grow(std::span<const Growth> step, std::vector<BlockCopy>& copies);
  void commit();
  void rollback();

  /// As `grow`, but `commit` leaves the length as it is: the room is held until release.
  void hold(int64_t sequence, int tokens, std::vector<BlockCopy>& copies);
  void fork(int64_t source, int64_t target);
  void release(int64_t sequence);
  /// Drops the tokens after the first `length`, and the room held beyond them.
  void truncate(int64_t sequence, int length);
  void reset();

  /// Remembers a sequence, live or not, before steps that may have to be taken back together; ends with `restore` or `forget`.
  Savepoint save(int64_t sequence);
  void restore(const Savepoint&);
  void forget(const Savepoint&);

  bool live(int64_t sequence) const { return sequences_.count(sequence) != 0; }
  const Sequence& at(int64_t sequence) const;
  int live_sequences() const { return static_cast<int>(sequences_.size()); }
  int total_blocks() const { return static_cast<int>(references_.size()); }
  int free_blocks() const { return static_cast<int>(free_.size()); }
  /// Block tables that hold the block.
  int references(int32_t block) const { return references_[static_cast<size_t>(block)]; }
  /// Blocks that became free since the last call (for poisoning in tests).
  std::vector<int32_t> take_freed();
  void track_freed() { track_freed_ = true; }

 private:
  struct Undo {
    int64_t sequence;
    int tokens;
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
  int32_t take_block();
  void drop_block(int32_t block);
  void append_blocks(Sequence& sequence, size_t count);
  int first_written(const Sequence& sequence) const { return sequence.length / kv_block_tokens; }
  bool must_copy(const Sequence& sequence) const;

  int max_sequences_, context_length_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::vector<int32_t> free_;        // a stack
  std::vector<int32_t> references_;  // per block
  std::vector<Undo> undo_;           // of the step that is under way
  std::vector<int32_t> freed_;
  bool track_freed_ = false;
};

inline int blocks_for(int tokens) { return tokens / kv_block_tokens + (tokens % kv_block_tokens != 0); }

}  // namespace ferrum
