// Attention of some queries of one kv head over a range of keys, some blocks at a time.

void write_key(const float* key, int head_dim, KvType type, int place, std::byte* block) {
  switch (type) {
    case KvType::F16: return write_key_as<uint16_t>(key, head_dim, place, block);
    case KvType::F32: return write_key_as<float>(key, head_dim, place, block);
    case KvType::Q8_0: return write_groups<KvGroupQ8_0::key_at>(key, head_dim, place, block);
  }
}
void write_value(const float* value, int head_dim, KvType type, int place, std::byte* block) {
  switch (type) {
    case KvType::F16: return write_value_as<uint16_t>(value, head_dim, place, block);
    case KvType::F32: return write_value_as<float>(value, head_dim, place, block);
    case KvType::Q8_0: return write_groups<KvGroupQ8_0::value_at>(value, head_dim, place, block);
  }
}

/// The blocks that begin at key `begin`, and those after them: the blocks of a sequence lie anywhere, so that the processor cannot guess them.
template <class Element> inline Blocks<Element> blocks_at(const AttentionTileArgs& a, int begin) {
  constexpr int count = blocks_together<Element>;
  const int last = (a.key_end - 1) / 16;
  auto offset = [&](int block) { return static_cast<size_t>(a.blocks[block < last ? block : last]) * a.block_bytes; };
  Blocks<Element> out;
  for (int b = 0; b < count; ++b) {
    const size_t here = offset(begin / 16 + b), next = offset(begin / 16 + count + b);
    out.keys[b] = reinterpret_cast<const Element*>(a.keys + here);
    out.values[b] = reinterpret_cast<const Element*>(a.values + here);
    out.next_keys[b] = a.keys + next;
    out.next_values[b] = a.values + next;
  }
  return out;
}

template <class Element> void attention_tile_of(const AttentionTileArgs& a) {
  constexpr int together = 16 * blocks_together<Element>;
  const int rows = a.queries * a.group;
  auto row_at = [&](int r) { return attention_row(a, r, static_cast<const Element*>(nullptr)); };
  for (int r = 0; r < rows; ++r) {
    float* state = row_at(r).state;
    std::memset(state, 0, static_cast<size_t>(a.head_dim) * sizeof(float));
    state[a.head_dim] = -INFINITY;
    state[a.head_dim + 1] = 0;
  }
  for (int begin = a.key_begin; begin < a.key_end; begin += together) {
    const Blocks<Element> blocks = blocks_at<Element>(a, begin);
    bool ahead = begin + together < a.key_end;  // until some rows did it for all
    // The heads of a query see the same keys; from the first query that sees all of these on, all rows do.
    for (int r = 0; r < rows;) {
      const int seen = a.first_position + r / a.group - begin + 1, visible = seen < together ? seen : together;
      const int alike = visible < together ? a.group - r % a.group : rows - r;
      const int count = visible <= 0 ? 0 : alike >= most_attention_rows ? most_attention_rows : alike >= 4 ? 4 : 1;
      decltype(row_at(0)) some[most_attention_rows];
      for (int i = 0; i < count; ++i) some[i] = row_at(r + i);
      if (count == most_attention_rows) ahead ? add_blocks<true, most_attention_rows>(a, some, blocks, visible) : add_blocks<false, most_attention_rows>(a, some, blocks, visible);
      else if (count == 4) ahead ? add_blocks<true, 4>(a, some, blocks, visible) : add_blocks<false, 4>(a, some, blocks, visible);
      else if (count == 1) ahead ? add_blocks<true, 1>(a, some, blocks, visible) : add_blocks<false, 1>(a, some, blocks, visible);
      ahead &= count == 0;
      r += count ? count : alike;
    }
  }
}

void attention_tile(const AttentionTileArgs& a) {
  switch (a.kv_type) {
    case KvType::F16: return attention_tile_of<uint16_t>(a);
    case KvType::F32: return attention_tile_of<float>(a);
    case KvType::Q8_0:
      pack_queries(a);
      return attention_tile_of<KvGroupQ8_0>(a);
  }
}

void attention_combine(float* total, const float* partial, int head_dim) {
  if (partial[head_dim + 1] == 0.0f) return;
  const float largest = total[head_dim] > partial[head_dim] ? total[head_dim] : partial[head_dim];
  const float keep = exp(total[head_dim] - largest), take = exp(partial[head_dim] - largest);
  each_vector(head_dim, [&](int i, int n) { put(total + i, fma(get(total + i, n), set1(keep), get(partial + i, n) * set1(take)), n); });
  total[head_dim + 1] = fma(total[head_dim + 1], keep, partial[head_dim + 1] * take);
  total[head_dim] = largest;
}

void attention_result(const float* total, int head_dim, float* out) {
  const F8 scale = set1(1.0f / total[head_dim + 1]);
  each_vector(head_dim, [&](int i, int n) { put(out + i, get(total + i, n) * scale, n); });
}
