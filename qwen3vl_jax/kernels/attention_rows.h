// Included once for every instruction set, after linear_rows.h and encoded_rows.h, whose products it uses.

// sums[g, 0 .. 2 * kLanes] += sum_s weights[g, s] * values[s, from the column on], over a tile of keys.
template <typename T, int G>
TARGET void mix(const float* weights, const T* values, int64_t keys, int64_t row, float* sums, int64_t stride) {
  Vector first[G], second[G];
  for (int g = 0; g < G; ++g) first[g] = load(sums + g * stride), second[g] = load(sums + g * stride + kLanes);
  for (int64_t s = 0; s < keys; ++s) {
    Vector v_first, v_second;
    load(values + s * row, v_first, v_second);
    for (int g = 0; g < G; ++g) {
      const Vector weight = fill(weights[g * kTileKeys + s]);
      first[g] = fma(weight, v_first, first[g]);
      second[g] = fma(weight, v_second, second[g]);
    }
  }
  for (int g = 0; g < G; ++g) store(sums + g * stride, first[g]), store(sums + g * stride + kLanes, second[g]);
}

// Scores become weights exp(score - peak); sums so far are brought down when the peak rises.
TARGET inline void weigh(float* scores, const bool* seen, int64_t keys, float scale, float& peak, float& total,
                         float* sums, int64_t columns) {
  float highest = peak;
  for (int64_t s = 0; s < keys; ++s)
    if (seen[s]) highest = std::max(highest, scores[s] *= scale);
  if (highest > peak) {
    const float shrink = std::exp(peak - highest);
    total *= shrink;
    for (int64_t c = 0; c < columns; ++c) sums[c] *= shrink;
    peak = highest;
  }
  for (int64_t s = 0; s < keys; ++s) total += scores[s] = seen[s] ? std::exp(scores[s] - peak) : 0.0f;
}

// scores[g, 0 .. count] = the products of query g with a tile of keys.
template <typename T>
TARGET inline void score(const Attention& a, const T* keys, int64_t count, float* scores) {
  if constexpr (kEncoded<T>) {
    WholeRows queries = *static_cast<const WholeRows*>(a.queries);
    queries.y = scores;
    avx2::integer_product<Int8>(
        Encoded{reinterpret_cast<const uint8_t*>(keys), a.size, kTileKeys, a.row, a.size, 1, kWholeRow}, queries, 0,
        count);
  } else
    compute<T>(Product{a.queries, keys, scores, a.groups, a.size, kTileKeys}, 0, count);
}

// Codes are summed as they are: their scales go into the weights.
inline void apply_scales(const Attention& a, const Code* values, int64_t count, float* weights) {
  for (int64_t s = 0; s < count; ++s) {
    float scale;
    std::memcpy(&scale, values + s * a.row + a.size, sizeof(scale));
    for (int64_t g = 0; g < a.groups; ++g) weights[g * kTileKeys + s] *= scale;
  }
}

// Softmax attention in one pass over the keys that are seen. Nothing seen gives zeros.
template <typename T>
TARGET void attend(const Attention& a) {
  constexpr int64_t kStep = 2 * kLanes;
  const int64_t steps = (a.size + kStep - 1) / kStep, columns = steps * kStep;
  const float scale = 1.0f / std::sqrt(float(a.size));
  std::vector<float> sums(a.groups * columns), scores(a.groups * kTileKeys), total(a.groups);
  std::vector<float> peak(a.groups, -std::numeric_limits<float>::infinity());
  std::vector<T> tail(kTileKeys * kStep);
  const T *keys = static_cast<const T*>(a.keys), *values = static_cast<const T*>(a.values);
  for (int64_t tile = 0; tile < a.slots; tile += kTileKeys) {
    const int64_t count = std::min(kTileKeys, a.slots - tile);
    const bool* seen = a.seen + tile;
    if (std::none_of(seen, seen + count, [](bool one) { return one; })) continue;
    score<T>(a, keys + tile * a.row, count, scores.data());
    for (int64_t g = 0; g < a.groups; ++g)
      weigh(&scores[g * kTileKeys], seen, count, scale, peak[g], total[g], &sums[g * columns], columns);
    if constexpr (kEncoded<T>) apply_scales(a, values + tile * a.row, count, scores.data());
    for (int64_t column = 0; column < columns; column += kStep) {
      const T* from = values + tile * a.row + column;
      int64_t stride = a.row;
      if (column + kStep > a.size) {  // The last few columns, followed by zeros.
        for (int64_t s = 0; s < count; ++s)
          std::memcpy(&tail[s * kStep], from + s * a.row, (a.size - column) * sizeof(T));
        from = tail.data(), stride = kStep;
      }
      int64_t g = 0;
      for (; g + 4 <= a.groups; g += 4)
        mix<T, 4>(&scores[g * kTileKeys], from, count, stride, &sums[g * columns + column], columns);
      for (; g + 2 <= a.groups; g += 2)
        mix<T, 2>(&scores[g * kTileKeys], from, count, stride, &sums[g * columns + column], columns);
      for (; g < a.groups; ++g)
        mix<T, 1>(&scores[g * kTileKeys], from, count, stride, &sums[g * columns + column], columns);
    }
  }
  for (int64_t g = 0; g < a.groups; ++g)
    for (int64_t i = 0; i < a.size; ++i) {
      const int64_t in_step = i % kStep, even_odd = in_step % 2 * kLanes + in_step / 2;
      const float sum = sums[g * columns + i - in_step + (kEvenOdd<T> ? even_odd : in_step)];
      a.mixed[g * a.size + i] = total[g] > 0.0f ? sum / total[g] : 0.0f;
    }
}
