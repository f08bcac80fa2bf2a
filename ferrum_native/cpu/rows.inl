// Row kernels: norms, rotation, softmax, the SiLU product and the weighted sum of expert outputs.

/// Sum of squares: partial sum j of 32 takes the values i = j (mod 32) in rising order.
inline float sum_of_squares(const float* x, int size) {
  F8 sums[4] = {zero(), zero(), zero(), zero()};
  int turn = 0;
  each_vector(size, [&](int i, int n) {
    const F8 v = get(x + i, n);
    sums[turn] = fma(v, v, sums[turn]);
    turn = (turn + 1) % 4;
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float inverse_rms(const float* x, int size, float eps) { return 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + eps); }

void norm(const NormRowArgs& a) {
  if (a.delta) each_vector(a.size, [&](int i, int n) { put(a.residual + i, get(a.residual + i, n) + get(a.delta + i, n), n); });
  const F8 scale = set1(inverse_rms(a.residual, a.size, a.eps));
  each_vector(a.size, [&](int i, int n) { put(a.out + i, get(a.residual + i, n) * scale * get(a.weight + i, n), n); });
}

void qk_norm_rope(const QkNormRopeArgs& a) {
  if (a.weight) {
    const F8 scale = set1(inverse_rms(a.in, a.head_dim, a.eps));
    each_vector(a.head_dim, [&](int i, int n) { put(a.out + i, get(a.in + i, n) * scale * get(a.weight + i, n), n); });
  } else {
    std::memcpy(a.out, a.in, static_cast<size_t>(a.head_dim) * sizeof(float));
  }
  const int half = a.rotary_dim / 2;
  each_vector(half, [&](int i, int n) {
    const F8 x = get(a.out + i, n), y = get(a.out + half + i, n), cos = get(a.cos_sin + i, n), sin = get(a.cos_sin + half + i, n);
    put(a.out + i, x * cos - y * sin, n);
    put(a.out + half + i, x * sin + y * cos, n);
  });
}

void softmax(float* x, int size) {
  float largest = x[0];
  for (int i = 1; i < size; ++i) largest = x[i] > largest ? x[i] : largest;
  const F8 shift = set1(largest);
  F8 sums = zero();
  each_vector(size, [&](int i, int n) {
    put(x + i, exp(get(x + i, n) - shift), n);
    sums = sums + get(x + i, n);
  });
  const F8 total = set1(reduce_add(sums));
  each_vector(size, [&](int i, int n) { put(x + i, get(x + i, n) / total, n); });
}

void silu_product(float* gate, const float* up, int size) {
  each_vector(size, [&](int i, int n) {
    const F8 g = get(gate + i, n);
    put(gate + i, g / (set1(1.0f) + exp(zero() - g)) * get(up + i, n), n);
  });
}

void add_weighted(const float* x, float weight, int size, float* out) {
  const F8 factor = set1(weight);
  each_vector(size, [&](int i, int n) { put(out + i, fma(factor, get(x + i, n), get(out + i, n)), n); });
}
