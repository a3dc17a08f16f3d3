// Products with rows of int8 or int4 codes. Included once for every instruction set, after linear_rows.h.
//
// A row is read in units of kUnit numbers that share their terms; a unit in steps of 32 numbers. Codes
// become numbers in registers, once for up to four rows of x.

template <typename F, int O>
TARGET inline __attribute__((always_inline)) void decode(const uint8_t* w, int64_t w_stride, const Vector (&scale)[O],
                                                         const Vector (&minimum)[O],
                                                         Vector (&numbers)[O][kStepNumbers / kLanes]) {
  for (int o = 0; o < O; ++o) {
    if constexpr (F::kBits == 4) {
      unpack<F::kTerms == 2>(w + o * w_stride, scale[o], minimum[o], numbers[o]);
    } else {
      for (int v = 0; v < kStepNumbers / kLanes; ++v)
        numbers[o][v] = mul(widen(w + o * w_stride + v * kLanes), scale[o]);
    }
  }
}

// sums[r][o] += the product of a unit of row r of x and row o of w. `terms` are those of the first row.
template <typename F, int R, int O>
TARGET inline __attribute__((always_inline)) void unit(const float* x, const uint8_t* w, int64_t w_stride,
                                                       const float* terms, int64_t terms_stride, int64_t ahead,
                                                       Vector (&sums)[R][O]) {
  Vector scale[O], minimum[O], numbers[O][kStepNumbers / kLanes];
  for (int o = 0; o < O; ++o) {
    scale[o] = fill(terms[o * terms_stride]);
    minimum[o] = F::kTerms == 2 ? fill(terms[o * terms_stride + 1]) : zero();
  }
#pragma GCC unroll 2
  for (int step = 0; step < F::kUnit / kStepNumbers; ++step, x += kStepNumbers, w += F::kStepBytes) {
    decode<F, O>(w, w_stride, scale, minimum, numbers);
    for (int o = 0; o < O; ++o) _mm_prefetch(reinterpret_cast<const char*>(w + o * w_stride + ahead), _MM_HINT_T0);
    for (int v = 0; v < kStepNumbers / kLanes; ++v)
      for (int r = 0; r < R; ++r) {
        const Vector part = load(x + r * F::kUnit + v * kLanes);
        for (int o = 0; o < O; ++o) sums[r][o] = fma(part, numbers[o][v], sums[r][o]);
      }
  }
}

template <typename F, int R, int O>
TARGET void encoded_block(const Encoded& p, int64_t row, int64_t output, const float* terms) {
  const float* x = p.x + row * F::kUnit;
  const uint8_t* w = p.w + output * p.row_bytes;
  const int64_t whole = p.in / F::kUnit, rest = p.code_bytes - whole * F::kUnitBytes;
  // Into the cache comes the block after the next: two blocks are some 10 KB.
  int64_t stride = p.row_bytes, ahead = 2 * O * p.row_bytes;
  uint8_t tail[O][F::kUnitBytes];
  Vector sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = zero();
  for (int64_t u = 0; u < whole + (rest > 0); ++u, x += p.rows * F::kUnit, w += F::kUnitBytes) {
    if (u == whole) {  // The last few numbers, followed by zeros.
      std::memset(tail, 0, sizeof(tail));
      for (int o = 0; o < O; ++o) std::memcpy(tail[o], w + o * stride, rest);
      w = tail[0], stride = F::kUnitBytes, ahead = 0;
    }
    unit<F, R, O>(x, w, stride, terms + (u >> p.group_shift) * F::kTerms, p.terms, ahead, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      p.y[(row + r) * p.out + output + o] = sum(sums[r][o]);
}

// Numbers in order, as float32.
template <typename T>
TARGET void widened(const T* from, int64_t count, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, count * sizeof(float));
  } else if constexpr (std::is_same_v<T, Bfloat16>) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t(from[i].bits) << 16;
      std::memcpy(to + i, &bits, sizeof(bits));
    }
  } else {
    constexpr int64_t kStep = 2 * kLanes;
    Vector first, second;
    for (; count >= kStep; from += kStep, to += kStep, count -= kStep) {
      load(from, first, second);
      store(to, first), store(to + kLanes, second);
    }
    Float16 tail[kStep] = {};
    float wide[kStep];
    std::memcpy(tail, from, count * sizeof(Float16));
    load(tail, first, second);
    store(wide, first), store(wide + kLanes, second);
    std::memcpy(to, wide, count * sizeof(float));
  }
}

template <typename F>
TARGET inline void read_terms(const Encoded& p, int64_t output, float* to) {
  const uint8_t* from = p.w + output * p.row_bytes + p.code_bytes;
  if constexpr (F::kBits == 4)
    widened(reinterpret_cast<const Float16*>(from), p.terms, to);
  else
    std::memcpy(to, from, p.terms * sizeof(float));
}

template <typename F, int O>
TARGET void encoded_all_rows(const Encoded& p, int64_t output, float* terms) {
  for (int o = 0; o < O; ++o) read_terms<F>(p, output + o, terms + o * p.terms);
  int64_t row = 0;
  if constexpr (O > 1) {
    if constexpr (kRows > 3)
      for (; row + 4 <= p.rows; row += 4) encoded_block<F, 4, O>(p, row, output, terms);
    for (; row + 2 <= p.rows; row += 2) encoded_block<F, 2, O>(p, row, output, terms);
  }
  for (; row < p.rows; ++row) encoded_block<F, 1, O>(p, row, output, terms);
}

template <typename F>
TARGET void encoded_product(const Encoded& p, int64_t begin, int64_t end) {
  std::vector<float> terms(kOutputs * p.terms);
  int64_t output = begin;
  for (; output + kOutputs <= end; output += kOutputs) encoded_all_rows<F, kOutputs>(p, output, terms.data());
  for (; output < end; ++output) encoded_all_rows<F, 1>(p, output, terms.data());
}

// Rows begin .. end of w as numbers, [end - begin, in].
template <typename F, typename T>
TARGET void decoded_rows(const Encoded& p, int64_t begin, int64_t end, T* to) {
  std::vector<float> terms(p.terms);
  for (int64_t output = begin; output < end; ++output, to += p.in) {
    read_terms<F>(p, output, terms.data());
    const uint8_t* w = p.w + output * p.row_bytes;
    for (int64_t at = 0, u = 0; at < p.in; at += F::kUnit, ++u) {
      const float* own = &terms[(u >> p.group_shift) * F::kTerms];
      const Vector scale[1] = {fill(own[0])}, minimum[1] = {F::kTerms == 2 ? fill(own[1]) : zero()};
      const int64_t count = std::min(F::kUnit, p.in - at), bytes = std::min(F::kUnitBytes, p.code_bytes - u * F::kUnitBytes);
      const bool whole = count == F::kUnit;
      uint8_t tail[F::kUnitBytes];
      T numbers[F::kUnit];
      if (!whole) std::memset(tail, 0, sizeof(tail)), std::memcpy(tail, w, bytes), w = tail;
      T* here = whole ? to + at : numbers;
      for (int step = 0; step < F::kUnit / kStepNumbers; ++step, w += F::kStepBytes) {
        Vector part[1][kStepNumbers / kLanes];
        decode<F, 1>(w, 0, scale, minimum, part);
        for (int v = 0; v < kStepNumbers / kLanes; ++v)
          store(here + step * kStepNumbers + v * kLanes, part[0][v]);
      }
      if (whole) continue;
      const int64_t low = F::kBits == 4 ? bytes : count;  // A short run's low halves come first.
      std::memcpy(to + at, numbers, low * sizeof(T));
      std::memcpy(to + at + low, numbers + kStepNumbers / 2, (count - low) * sizeof(T));
    }
  }
}
