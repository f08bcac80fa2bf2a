// One ragged step: any mix of prompt chunks and single decode tokens of any sequences.
#pragma once
#include <cstdint>
#include <vector>

namespace ferrum {

constexpr int kv_block_tokens = 16;
/// Marks an entry of a block table that no token of the sequence has reached.
constexpr int32_t invalid_block = -1;

/// T tokens of S sequences; the tokens of a sequence are contiguous and their positions rise by one. L rows of logits are wanted.
struct Batch {
  int tokens = 0, sequences = 0, max_blocks = 0;
  std::vector<int32_t> token_ids;       // [T]
  std::vector<int32_t> positions;       // [T], from 0 in each sequence
  std::vector<int32_t> kv_slots;        // [T], block * kv_block_tokens + position % kv_block_tokens
  std::vector<int32_t> query_start;     // [S + 1], first token of each sequence
  std::vector<int32_t> context_length;  // [S], tokens of the sequence after this step
  std::vector<int32_t> block_tables;    // [S, max_blocks]
  std::vector<int32_t> logit_rows;      // [L], rising
  std::vector<float> rope_cos_sin;      // [T, rotary_dim]: cos of each pair's angle, then sin of each

  int logit_count() const { return static_cast<int>(logit_rows.size()); }
};

}  // namespace ferrum
