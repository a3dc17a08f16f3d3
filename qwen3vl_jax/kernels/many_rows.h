// Products of many rows, after Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication" (2008). Included once for every instruction set, after linear_rows.h.
//
// A strip of the depth at a time: of all rows, packed for all threads, and of kPanel outputs, packed
// by the thread that computes them. Numbers of 16 bits are widened when they are packed.

constexpr int kPanel = 2 * kLanes;  // Outputs side by side.

TARGET inline __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
TARGET inline __m256 eight(const Bfloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
TARGET inline __m256 eight(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

TARGET inline void transpose(__m256 (&v)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

// to[k][o] = w[o][k] for `depth` numbers of `outputs` rows of w, and zeros for the rest of the panel.
template <typename T>
TARGET void pack_panel(const T* w, int64_t stride, int64_t outputs, int64_t depth, float* to) {
  for (int64_t first = 0; first < kPanel; first += 8)
    for (int64_t k = 0; k < depth; k += 8) {
      const int64_t count = std::min<int64_t>(8, depth - k);
      __m256 block[8];
      for (int64_t o = 0; o < 8; ++o) {
        T tail[8] = {};
        const T* from = w + (first + o) * stride + k;
        if (first + o >= outputs)
          from = tail;
        else if (count < 8)
          std::memcpy(tail, from, count * sizeof(T)), from = tail;
        block[o] = eight(from);
      }
      transpose(block);
      for (int64_t i = 0; i < count; ++i) _mm256_storeu_ps(to + (k + i) * kPanel + first, block[i]);
    }
}

// to[k][r] = x[r][k] for `depth` numbers of `rows` rows of x, and zeros up to kTileRows.
template <typename T>
TARGET void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, float* to) {
  float wide[kDepth];
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (r < rows)
      widened(x + r * stride, depth, wide);
    else
      std::memset(wide, 0, sizeof(wide));
    for (int64_t k = 0; k < depth; ++k) to[k * kTileRows + r] = wide[k];
  }
}

// y[rows][outputs] += the product of one packed tile of rows and one packed panel, or = it.
TARGET inline void multiply_tile(const float* x, const float* w, int64_t depth, bool add, int64_t rows,
                                 int64_t outputs, int64_t stride, float* y) {
  Vector sums[kTileRows][2];
  for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = zero();
  for (int64_t k = 0; k < depth; ++k, x += kTileRows, w += kPanel) {
    const Vector first = load(w), second = load(w + kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const Vector one = fill(x[r]);
      sums[r][0] = fma(one, first, sums[r][0]);
      sums[r][1] = fma(one, second, sums[r][1]);
    }
  }
  for (int r = 0; r < rows; ++r, y += stride) {
    float results[kPanel];
    float* to = outputs == kPanel ? y : results;
    if (to == results && add) std::memcpy(results, y, outputs * sizeof(float));
    const Vector none = zero();
    store(to, add_up(add ? load(to) : none, sums[r][0]));
    store(to + kLanes, add_up(add ? load(to + kLanes) : none, sums[r][1]));
    if (to == results) std::memcpy(y, results, outputs * sizeof(float));
  }
}

// Outputs begin .. end of a strip; `x` has its packed rows, `w` is at the first number of the strip.
template <typename T>
TARGET void multiply_strip(const Strip& s, int64_t begin, int64_t end) {
  float panel[kDepth * kPanel];
  for (int64_t output = begin; output < end; output += kPanel) {
    const int64_t outputs = std::min<int64_t>(kPanel, end - output);
    pack_panel(static_cast<const T*>(s.w) + output * s.in, s.in, outputs, s.depth, panel);
    for (int64_t row = 0; row < s.rows; row += kTileRows)
      multiply_tile(s.x + row * s.depth, panel, s.depth, s.add, std::min<int64_t>(kTileRows, s.rows - row), outputs,
                    s.out, s.y + row * s.out + output);
  }
}
