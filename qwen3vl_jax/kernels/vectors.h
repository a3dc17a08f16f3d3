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
#include <type_traits>
#include <vector>

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct Code { int8_t code; };  // Of an encoded row, whose float32 scale follows its codes.

// y[r, o] = sum_i x[r, i] * w[o, i].
struct Product {
  const void* x;  // Packed: [ceil(in / step), rows, step] where step = 2 * kLanes, zeros after `in`.
  const void* w;
  float* y;
  int64_t rows, in, out;
};

// A part of a product of many rows: y[r, o] (+)= sum of `depth` terms.
struct Strip {
  const float* x;  // Packed: [ceil(rows / tile), depth, tile].
  const void* w;   // The first number of the strip in row 0.
  float* y;
  int64_t rows, in, out, depth;
  bool add;
};

constexpr int64_t kDepth = 384;  // A panel of 16 outputs takes 24 KB of the first cache.

// One new token's attention, of one key head and the query heads that share it.
struct Attention {
  const void* queries;  // As the x of a Product with rows = groups, in = size; or WholeRows, if keys are codes.
  const void* keys;     // [slots, row] of which `size` are numbers, or codes
  const void* values;   // [slots, row]
  const bool* seen;     // [slots]
  float* mixed;         // [groups, size]
  int64_t groups, slots, size, row;
};

// A matrix [out, in] that is made of codes and terms (encoded.h has the layout).
struct Encoded {
  const uint8_t* w;  // [out, row_bytes]
  int64_t in, out, row_bytes;
  int64_t code_bytes = 0, terms = 0;  // Of a row: its codes, then as many scales and minima.
  int64_t group_shift = 0;            // A group is 1 << group_shift units.
};

// Rows of whole numbers to multiply with it (integer_rows.h makes them), and where their products go.
struct WholeRows {
  const int16_t* words;  // [ceil(in / kSpan), rows, kSpan], zeros after `in`; for int4 in the order of its nibbles
  const float* scales;   // [rows, units], units filled up to whole vectors; number = word * scale
  const float* sums;     // [rows, units] of a unit's numbers
  float* y;              // [rows, out]
  int64_t rows, units;
};

constexpr int64_t kSpan = 64;         // Numbers that are multiplied before their sums become float32.
constexpr int64_t kStepNumbers = 32;  // Numbers that are decoded at once.
constexpr int64_t kWholeRow = 62;  // The group_shift with which all units have the first terms.

template <int Bits, int Terms, int64_t Unit>
struct Codes {
  static constexpr int kBits = Bits, kTerms = Terms;
  static constexpr int64_t kUnit = Unit, kUnitBytes = Unit * Bits / 8, kStepBytes = kStepNumbers * Bits / 8;
};
using Int8 = Codes<8, 1, 64>;
using Int4 = Codes<4, 1, 32>;
using Int4Zero = Codes<4, 2, 32>;
template <typename F>
constexpr int64_t kSpanUnits = kSpan / F::kUnit;
enum class Form { kInt8, kInt4, kInt4Zero };

template <typename T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<Bfloat16> = true;
template <typename T>
constexpr bool kEncoded = std::is_same_v<T, Code>;

constexpr int64_t kTileKeys = 64;  // Their scores, and 128 values of each, fit the first cache.

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int kLanes = 8, kOutputs = 4, kRows = 3, kTileRows = 6;
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
TARGET inline void store(Bfloat16* to, Vector v) {  // To the nearest, of two as near the even one; finite numbers.
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i words = _mm256_srli_epi32(up, 16);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
}
TARGET inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
TARGET inline Vector add_up(Vector a, Vector b) { return _mm256_add_ps(a, b); }
TARGET inline Vector widen(const uint8_t* int8) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(int8))));
}
TARGET inline void load(const Code* from, Vector& first, Vector& second) {
  first = widen(reinterpret_cast<const uint8_t*>(from));
  second = widen(reinterpret_cast<const uint8_t*>(from + kLanes));
}
template <bool kMinimum>
TARGET inline void unpack(const uint8_t* int4, Vector scale, Vector minimum, Vector (&to)[4]) {
  if (!kMinimum) minimum = _mm256_mul_ps(scale, _mm256_set1_ps(-8.0f));
  for (int half = 0; half < 2; ++half) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(int4 + 8 * half));
    const __m256i words = _mm256_cvtepu8_epi32(bytes);
    to[half] = fma(_mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15))), scale, minimum);
    to[2 + half] = fma(_mm256_cvtepi32_ps(_mm256_srli_epi32(words, 4)), scale, minimum);
  }
}
#include "linear_rows.h"
#include "encoded_rows.h"
#include "integer_rows.h"
#include "many_rows.h"
#include "attention_rows.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma,f16c")))  // Whatever has the first has all.
constexpr int kLanes = 16, kOutputs = 4, kRows = 4, kTileRows = 12;
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
TARGET inline void store(Bfloat16* to, Vector v) {  // As that of AVX2.
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
TARGET inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
TARGET inline Vector add_up(Vector a, Vector b) { return _mm512_add_ps(a, b); }
TARGET inline Vector widen(const uint8_t* int8) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(int8))));
}
TARGET inline void load(const Code* from, Vector& first, Vector& second) {
  first = widen(reinterpret_cast<const uint8_t*>(from));
  second = widen(reinterpret_cast<const uint8_t*>(from + kLanes));
}
// The sixteen numbers that a group can have are a table, looked up by the low four bits of words.
template <bool kMinimum>
TARGET inline void unpack(const uint8_t* int4, Vector scale, Vector minimum, Vector (&to)[2]) {
  const Vector codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vector table =
      kMinimum ? fma(codes, scale, minimum) : mul(_mm512_sub_ps(codes, _mm512_set1_ps(8.0f)), scale);
  const __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(int4)));
  to[0] = _mm512_permutexvar_ps(words, table);
  to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), table);
}
#include "linear_rows.h"
#include "encoded_rows.h"
#include "many_rows.h"
#include "attention_rows.h"
#undef TARGET
}  // namespace avx512
