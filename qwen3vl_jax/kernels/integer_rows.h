// Products of few rows with codes as they lie: integers times integers, summed as integers.
//
// A row of x becomes int16 words, each unit of it (64 numbers beside int8 codes, 32 beside int4) with
// a power of two of its own: numbers of bfloat16 down to 1/128 of the unit's largest stay what they
// are, others are rounded to 2^-15 of the next power of two above it. Sixteen words meet sixteen
// codes in one instruction, eight sums become float32 once for 64 numbers. Compiled for AVX2 only: it
// waits for memory, and results are the same bits with AVX-512. Included in avx2 only, after encoded_rows.h.

constexpr int kWords = 16, kVectors = kSpan / kWords;

// A unit as words; returns its scale, and NaN for one that has any or infinity.
TARGET inline float whole_numbers(const float* x, int64_t count, int16_t* to, float& sum) {
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits.
  uint32_t bits[kSpan], largest = 0;
  int32_t rounding, total = 0;
  std::memcpy(bits, x, count * sizeof(float));
  std::memcpy(&rounding, &kRounding, sizeof(rounding));
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits[i] & 0x7fffffffu);
  const uint32_t exponent = std::max(largest >> 23, 15u);
  const uint32_t scale_bits = (exponent - 14) << 23, inverse_bits = (254 + 14 - exponent) << 23;
  float scale, inverse;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  std::memcpy(&inverse, &inverse_bits, sizeof(inverse));
  for (int64_t i = 0; i < count; ++i) {
    const float moved = x[i] * inverse + kRounding;
    int32_t word;
    std::memcpy(&word, &moved, sizeof(word));
    word = std::clamp(word - rounding, -32768, 32767);
    total += word;
    to[i] = int16_t(word);
  }
  if (exponent == 255) scale = std::numeric_limits<float>::quiet_NaN();
  sum = scale * float(total);
  return scale;
}

// Words of a span in the order in which int4 codes come out of a vector of bytes: all first numbers of
// the bytes' pairs, their seconds ... of two runs side by side.
inline void order_as_nibbles(const int16_t* words, int16_t* to) {
  constexpr int64_t kFirst[kVectors] = {0, 16, 1, 17};
  for (int v = 0; v < kVectors; ++v)
    for (int run = 0; run < 2; ++run)
      for (int i = 0; i < 8; ++i) to[v * kWords + run * 8 + i] = words[run * 32 + kFirst[v] + 2 * i];
}

// Codes of a span as words.
template <typename F>
TARGET inline __attribute__((always_inline)) void read_span(const uint8_t* w, __m256i (&codes)[kVectors]) {
  if constexpr (F::kBits == 8) {
    for (int v = 0; v < kVectors; ++v)
      codes[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + v * kWords)));
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), low = _mm256_set1_epi16(15);
    codes[0] = _mm256_and_si256(words, low);
    codes[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
    codes[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
    codes[3] = _mm256_srli_epi16(words, 12);
  }
}

// What makes numbers of a span's sums: one scale, or one for each half.
template <typename F>
TARGET inline __attribute__((always_inline)) __m256 span_scale(const float* scales) {
  if constexpr (kSpanUnits<F> == 1) return _mm256_broadcast_ss(scales);
  const __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(scales)));
  return _mm256_permutevar_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

// y[r][o] = the product of R rows and O outputs, and what is `added`; scales [R, O, units] are those of both.
template <typename F, int R, int O>
TARGET void integer_block(const Encoded& e, const WholeRows& x, int64_t row, int64_t output, const float* scales,
                          const float* added) {
  constexpr int64_t kBytes = kSpan * F::kBits / 8;
  const int16_t* words = x.words + row * kSpan;
  const uint8_t* w = e.w + output * e.row_bytes;
  const int64_t whole = e.in / kSpan, rest = e.code_bytes - whole * kBytes;
  int64_t stride = e.row_bytes, ahead = 2 * O * e.row_bytes;  // The block after the next: some 10 KB.
  uint8_t tail[O][kBytes];
  __m256 sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = _mm256_setzero_ps();
  for (int64_t s = 0; s < whole + (rest > 0); ++s, words += x.rows * kSpan, w += kBytes, scales += kSpanUnits<F>) {
    if (s == whole) {  // The last few codes, followed by what meets zeros.
      std::memset(tail, 0, sizeof(tail));
      for (int o = 0; o < O; ++o) std::memcpy(tail[o], w + o * stride, rest);
      w = tail[0], stride = kBytes, ahead = 0;
    }
    for (int o = 0; o < O; ++o) {
      __m256i codes[kVectors];
      read_span<F>(w + o * stride, codes);
      _mm_prefetch(reinterpret_cast<const char*>(w + o * stride + ahead), _MM_HINT_T0);
      for (int r = 0; r < R; ++r) {
        const auto* own = reinterpret_cast<const __m256i*>(words + r * kSpan);
        __m256i total = _mm256_madd_epi16(codes[0], _mm256_loadu_si256(own));
        for (int v = 1; v < kVectors; ++v)
          total = _mm256_add_epi32(total, _mm256_madd_epi16(codes[v], _mm256_loadu_si256(own + v)));
        const __m256 scale = span_scale<F>(scales + (r * O + o) * x.units);
        sums[r][o] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sums[r][o]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) x.y[(row + r) * e.out + output + o] = sum(sums[r][o]) + added[r * O + o];
}

// to[u] = the term of the group of unit u; eight more may be read of `groups`, and written.
TARGET inline void spread(const float* groups, int64_t units, int64_t group_shift, float* to) {
  const __m256i eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i lanes = _mm256_srl_epi32(eight, _mm_cvtsi64_si128(std::min<int64_t>(group_shift, 3)));
  for (int64_t u = 0; u < units; u += 8)
    _mm256_storeu_ps(to + u, _mm256_permutevar8x32_ps(_mm256_loadu_ps(groups + (u >> group_shift)), lanes));
}

// terms[0 .. units] are the scales of a row's units, the next `units` its minima, if it has any.
// `own` has room for twice the row's terms and 8.
template <typename F>
TARGET void read_units(const Encoded& e, int64_t output, int64_t units, float* own, float* terms) {
  const int64_t used = (e.in + F::kUnit - 1) / F::kUnit, groups = e.terms / F::kTerms;
  const bool as_they_lie = F::kTerms == 1 && e.group_shift == 0;
  read_terms<F>(e, output, as_they_lie ? terms : own);
  for (int t = 0; t < F::kTerms; ++t, terms += units) {
    const float* from = own;
    if constexpr (F::kTerms > 1) {
      float* apart = own + e.terms;
      for (int64_t g = 0; g < groups; ++g) apart[g] = own[g * F::kTerms + t];
      from = apart;
    }
    if (!as_they_lie) spread(from, used, e.group_shift, terms);
    std::fill(terms + used, terms + units, 0.0f);
  }
}

// to[u] = the scale of x times that of w; returns what minima add. Without any, int4 codes stand for 8 less.
template <typename F>
TARGET inline float join_units(const float* x_scales, const float* x_sums, const float* terms, int64_t units, float* to) {
  __m256 added = _mm256_setzero_ps();
  for (int64_t u = 0; u < units; u += 8) {
    _mm256_storeu_ps(to + u, _mm256_mul_ps(_mm256_loadu_ps(x_scales + u), _mm256_loadu_ps(terms + u)));
    if constexpr (F::kBits == 4)
      added = _mm256_fmadd_ps(_mm256_loadu_ps(x_sums + u), _mm256_loadu_ps(terms + (F::kTerms - 1) * units + u), added);
  }
  return F::kBits == 4 ? sum(added) * (F::kTerms == 1 ? -8.0f : 1.0f) : 0.0f;
}

template <typename F, int R, int O>
TARGET void integer_rows(const Encoded& e, const WholeRows& x, int64_t row, int64_t output, const float* terms,
                         float* scales) {
  float added[R * O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      added[r * O + o] = join_units<F>(x.scales + (row + r) * x.units, x.sums + (row + r) * x.units,
                                       terms + o * F::kTerms * x.units, x.units, scales + (r * O + o) * x.units);
  integer_block<F, R, O>(e, x, row, output, scales, added);
}

// Outputs begin .. end of all rows, by blocks of two rows and four outputs.
template <typename F>
TARGET void integer_product(const Encoded& e, const WholeRows& x, int64_t begin, int64_t end) {
  const int64_t room = 2 * e.terms + 8;
  std::vector<float> space(room + (F::kTerms + 2) * kOutputs * x.units);
  float *own = space.data(), *terms = own + room, *scales = terms + F::kTerms * kOutputs * x.units;
  for (int64_t output = begin; output < end;) {
    const bool block = end - output >= kOutputs;
    for (int64_t o = 0; o < (block ? kOutputs : 1); ++o)
      read_units<F>(e, output + o, x.units, own, terms + o * F::kTerms * x.units);
    int64_t row = 0;
    for (; block && row + 2 <= x.rows; row += 2) integer_rows<F, 2, kOutputs>(e, x, row, output, terms, scales);
    for (; block && row < x.rows; ++row) integer_rows<F, 1, kOutputs>(e, x, row, output, terms, scales);
    for (; row < x.rows; ++row) integer_rows<F, 1, 1>(e, x, row, output, terms, scales);
    output += block ? kOutputs : 1;
  }
}
