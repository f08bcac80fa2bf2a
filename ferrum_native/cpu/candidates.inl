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

/// exp(x) for x <= 0 in double, relative error below 3e-16; below -700: exp(-700), far under every sum it is added to.
/// Plain arithmetic that compilers turn into vectors; the integer part is rounded by adding 1.5 * 2^52.
inline double exp_below_zero(double x) {
  x = x < -700.0 ? -700.0 : x;
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;  // the low bits of `shifted` are n
  double power;
  std::memcpy(&power, &bits, 8);
  return p * power;
}

double sum_exp(const float* x, int size, double shift, double scale) {
  double sums[8] = {};
  int i = 0;
  for (; i + 8 <= size; i += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += exp_below_zero((static_cast<double>(x[i + lane]) - shift) * scale);
  for (; i < size; ++i) sums[i % 8] += exp_below_zero((static_cast<double>(x[i]) - shift) * scale);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}
