// Scans over a row of logits.

int next_greater(const float* x, int begin, int end, float threshold) {
  const F8 limit = set1(threshold);
  int i = begin;
  for (; i + lanes <= end; i += lanes) {
    const int mask = mask_greater(load(x + i), limit);
    if (mask) return i + __builtin_ctz(static_cast<unsigned>(mask));
  }
  for (; i < end; ++i)
    if (x[i] > threshold) return i;
  return end;
}

/// exp(x) for x <= 0 in double, relative error below 3e-16; below -700: exp(-700), far under every sum it is added to. NaN stays NaN.
/// The integer part is rounded by adding 1.5 * 2^52, whose low bits it then is; the rest by the Taylor polynomial of degree 12.
inline D4 exp_below_zero(D4 x) {
  const D4 magic = set1_double(6755399441055744.0);
  x = max(set1_double(-700.0), x);
  const D4 shifted = fma(x, set1_double(1.4426950408889634), magic);
  const D4 n = shifted - magic;
  const D4 r = fma(n, set1_double(-1.90821492927058770002e-10), fma(n, set1_double(-0.693147180369123816490), x));
  D4 p = set1_double(1.0 / 479001600.0);
  for (double term : {1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0})
    p = fma(p, r, set1_double(term));
  return p * exp2_of_shifted(shifted);
}

double sum_exp(const float* x, int size, double shift, double scale) {
  const D4 largest = set1_double(shift), factor = set1_double(scale);
  D4 low = set1_double(0.0), high = set1_double(0.0);
  auto add = [&](const float* values) {
    low = low + exp_below_zero((widen(values) - largest) * factor);
    high = high + exp_below_zero((widen(values + 4) - largest) * factor);
  };
  int i = 0;
  for (; i + 8 <= size; i += 8) add(x + i);
  if (i < size) {
    float padded[8];
    std::fill_n(padded, 8, -std::numeric_limits<float>::infinity());  // adds exp(-700)
    std::memcpy(padded, x + i, static_cast<size_t>(size - i) * sizeof(float));
    add(padded);
  }
  return reduce_add(low + high);
}
