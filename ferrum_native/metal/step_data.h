// What a step brings to the device: the batch, cut into tiles of queries, in the one buffer that `begin` writes.
#pragma once
#include "../../metal_src/shared/attention.h"
#include "memory.h"

namespace ferrum::metal {

class StepData {
 public:
  explicit StepData(const Device& device) : room_(device) { reserve({1, 1, 1, 1, {1, 1, 8}, 1, 1}); }
  static size_t bytes(const StepLimits& limits) { return layout(limits).bytes; }
  /// For steps within the limits; forgets the step before.
  void reserve(const StepLimits& limits);

  void write(const Batch&);
  /// For a call outside of steps, with this many rows.
  void write_rows(int rows);

  const shared::Step& step() const { return *room_.host<shared::Step>(layout_.step); }
  int splits() const { return splits_; }  // of the longest context of a decode tile
  int group() const { return group_; }    // query heads that attention takes together

  Place steps() const { return room_.place(layout_.step); }
  Place token_ids() const { return room_.place(layout_.token_ids); }
  Place kv_slots() const { return room_.place(layout_.kv_slots); }
  Place query_tiles() const { return room_.place(layout_.query_tiles); }
  Place block_tables() const { return room_.place(layout_.block_tables); }
  Place logit_rows() const { return room_.place(layout_.logit_rows); }
  Place rope_cos_sin() const { return room_.place(layout_.rope_cos_sin); }
  // Counts, as kernels read them.
  Place tokens() const { return room_.place(layout_.step + offsetof(shared::Step, tokens)); }
  Place logit_count() const { return room_.place(layout_.step + offsetof(shared::Step, logit_rows)); }
  Place any_rows() const { return room_.place(layout_.step + offsetof(shared::Step, any_rows)); }

 private:
  static shared::StepLayout layout(const StepLimits& limits);

  Room room_;
  shared::StepLayout layout_{};
  int group_ = 1, splits_ = 1;
};

}  // namespace ferrum::metal
