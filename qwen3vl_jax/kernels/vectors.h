// Numbers as vectors of float32, once for AVX2 and once for AVX-512, and the loops written with them.
//
// `load(from, first, second)` widens 2 * kLanes numbers. Of bfloat16 `first` has the even and `second`
// the odd ones (the low and high halves of 32-bit words); of the others they follow each other.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// y[r, o] = sum_i x[r, i] * w[o, i].
struct Product {
  const void* x;  // Packed: [ceil(in / step), rows, step] where step = 2 * kLanes, zeros after `in`.
  const void* w;
  float* y;
  int64_t rows, in, out;
};

// One new token's attention, of one key head and the query heads that share it.
struct Attention {
  const void* queries;  // Packed, as the x of a Product with rows = groups, in = size.
  const void* keys;     // [slots, size]
  const void* values;   // [slots, size]
  const bool* seen;     // [slots]
  float* mixed;         // [groups, size]
  int64_t groups, slots, size;
};

template <typename T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<Bfloat16> = true;

constexpr int64_t kTileKeys = 64;  // Their scores, and 128 values of each, fit the first cache.

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int kLanes = 8, kOutputs = 4, kRows = 3;
using Vector = __m256;
TARGET inline Vector zero() { return _mm256_setzero_ps(); }
TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
TARGET inline Vector fill(float value) { return _mm256_set1_ps(value); }
TARGET inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
TARGET inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
TARGET inline float sum(Vector v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
TARGET inline void load(const float* from, Vector& first, Vector& second) {
  first = _mm256_loadu_ps(from);
  second = _mm256_loadu_ps(from + 8);
}
TARGET inline void load(const Bfloat16* from, Vector& first, Vector& second) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
}
TARGET inline void load(const Float16* from, Vector& first, Vector& second) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  first = _mm256_cvtph_ps(_mm_loadu_si128(halves));
  second = _mm256_cvtph_ps(_mm_loadu_si128(halves + 1));
}
#include "linear_rows.h"
#include "attention_rows.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f")))
constexpr int kLanes = 16, kOutputs = 4, kRows = 4;
using Vector = __m512;
TARGET inline Vector zero() { return _mm512_setzero_ps(); }
TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
TARGET inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
TARGET inline Vector fill(float value) { return _mm512_set1_ps(value); }
TARGET inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
TARGET inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
TARGET inline void load(const float* from, Vector& first, Vector& second) {
  first = _mm512_loadu_ps(from);
  second = _mm512_loadu_ps(from + 16);
}
TARGET inline void load(const Bfloat16* from, Vector& first, Vector& second) {
  const __m512i words = _mm512_loadu_si512(from);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))));
}
TARGET inline void load(const Float16* from, Vector& first, Vector& second) {
  const __m256i* halves = reinterpret_cast<const __m256i*>(from);
  first = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
  second = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
}
#include "linear_rows.h"
#include "attention_rows.h"
#undef TARGET
}  // namespace avx512
