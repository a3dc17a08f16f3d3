// Included once for every instruction set, which has defined TARGET, Vector, kLanes, zero, fma, sum
// and load (2 * kLanes numbers as two vectors of float32).

// sums[r][o] += the product of 2 * kLanes numbers of row r of the packed x and row o of w.
template <typename T, int R, int O>
TARGET inline __attribute__((always_inline)) void step(const T* x, const T* w, int64_t w_stride, Vector (&sums)[R][O]) {
  Vector w_first[O], w_second[O];
  for (int o = 0; o < O; ++o) load(w + o * w_stride, w_first[o], w_second[o]);
  for (int r = 0; r < R; ++r) {
    Vector x_first, x_second;
    load(x + r * 2 * kLanes, x_first, x_second);
    for (int o = 0; o < O; ++o) sums[r][o] = fma(x_first, w_first[o], sums[r][o]);
    for (int o = 0; o < O; ++o) sums[r][o] = fma(x_second, w_second[o], sums[r][o]);
  }
}

// y[0..R, 0..O] from R rows of the packed x and O rows of w.
template <typename T, int R, int O>
TARGET void block(const Product& p, int64_t row, int64_t output) {
  constexpr int kStep = 2 * kLanes;
  const T* x = static_cast<const T*>(p.x) + row * kStep;
  const T* w = static_cast<const T*>(p.w) + output * p.in;
  Vector sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = zero();
  int64_t i = 0;
  for (; i + kStep <= p.in; i += kStep, x += p.rows * kStep) step<T, R, O>(x, w + i, p.in, sums);
  if (i < p.in) {
    T tail[O][kStep] = {};  // The last few numbers, followed by zeros.
    for (int o = 0; o < O; ++o) std::memcpy(tail[o], w + o * p.in + i, (p.in - i) * sizeof(T));
    step<T, R, O>(x, tail[0], kStep, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) p.y[(row + r) * p.out + output + o] = sum(sums[r][o]);
}

// All rows of x, up to kRows at a time, against the same O rows of w, which stay in the cache.
template <typename T, int O>
TARGET void all_rows(const Product& p, int64_t output) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) block<T, kRows, O>(p, row, output);
  if constexpr (kRows > 3)
    if (row + 3 == p.rows) return block<T, 3, O>(p, row, output);
  if constexpr (kRows > 2)
    if (row + 2 == p.rows) return block<T, 2, O>(p, row, output);
  if (row < p.rows) block<T, 1, O>(p, row, output);
}

template <typename T>
TARGET void compute(const Product& p, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + kOutputs <= end; output += kOutputs) all_rows<T, kOutputs>(p, output);
  for (; output < end; ++output) all_rows<T, 1>(p, output);
}
