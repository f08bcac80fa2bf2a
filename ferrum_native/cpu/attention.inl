// Attention of some queries of one kv head over a range of keys, block by block.

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

/// Brings the keys and values of a block near: the blocks of a sequence lie anywhere, so that the processor cannot guess the next one.
inline void prefetch_block(const AttentionTileArgs& a, int32_t block) {
  const size_t at = static_cast<size_t>(block) * a.block_bytes, bytes = 16 * kv_row_bytes(a.kv_type, a.head_dim);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(a.keys + at + line), __builtin_prefetch(a.values + at + line);
}

template <class Element> void attention_tile_of(const AttentionTileArgs& a) {
  const int rows = a.queries * a.group;
  auto row_at = [&](int r) { return attention_row(a, r, static_cast<const Element*>(nullptr)); };
  for (int r = 0; r < rows; ++r) {
    float* state = row_at(r).state;
    std::memset(state, 0, static_cast<size_t>(a.head_dim) * sizeof(float));
    state[a.head_dim] = -INFINITY;
    state[a.head_dim + 1] = 0;
  }
  for (int begin = a.key_begin; begin < a.key_end; begin += 16) {
    const auto block = static_cast<size_t>(a.blocks[begin / 16]) * a.block_bytes;
    const auto *keys = reinterpret_cast<const Element*>(a.keys + block), *values = reinterpret_cast<const Element*>(a.values + block);
    if (begin + 16 < a.key_end) prefetch_block(a, a.blocks[begin / 16 + 1]);
    // The heads of a query see the same keys; from the first query that sees the whole block on, all rows do.
    for (int r = 0; r < rows;) {
      const int seen = a.first_position + r / a.group - begin + 1, visible = seen < 16 ? seen : 16;
      const int alike = visible < 16 ? a.group - r % a.group : rows - r;
      const int count = visible <= 0 ? 0 : alike >= most_attention_rows ? most_attention_rows : alike >= 4 ? 4 : 1;
      decltype(row_at(0)) some[most_attention_rows];
      for (int i = 0; i < count; ++i) some[i] = row_at(r + i);
      if (count == most_attention_rows) add_block<most_attention_rows>(a, some, keys, values, visible);
      else if (count == 4) add_block<4>(a, some, keys, values, visible);
      else if (count == 1) add_block<1>(a, some, keys, values, visible);
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
