// From int8 or int4 codes to numbers. Included once for every instruction set.
//
// A row is read in units of kUnit numbers that share their terms; a unit in steps of 32 numbers.

template <typename F>
TARGET inline __attribute__((always_inline)) void decode(const uint8_t* w, Vector scale, Vector minimum,
                                                         Vector (&numbers)[kStepNumbers / kLanes]) {
  if constexpr (F::kBits == 4) {
    unpack<F::kTerms == 2>(w, scale, minimum, numbers);
  } else {
    for (int v = 0; v < kStepNumbers / kLanes; ++v) numbers[v] = mul(widen(w + v * kLanes), scale);
  }
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

// Rows begin .. end of w as numbers, [end - begin, in].
template <typename F, typename T>
TARGET void decoded_rows(const Encoded& p, int64_t begin, int64_t end, T* to) {
  std::vector<float> terms(p.terms);
  for (int64_t output = begin; output < end; ++output, to += p.in) {
    read_terms<F>(p, output, terms.data());
    const uint8_t* w = p.w + output * p.row_bytes;
    for (int64_t at = 0, u = 0; at < p.in; at += F::kUnit, ++u) {
      const float* own = &terms[(u >> p.group_shift) * F::kTerms];
      const Vector scale = fill(own[0]), minimum = F::kTerms == 2 ? fill(own[1]) : zero();
      const int64_t count = std::min(F::kUnit, p.in - at), bytes = std::min(F::kUnitBytes, p.code_bytes - u * F::kUnitBytes);
      const bool whole = count == F::kUnit;
      uint8_t tail[F::kUnitBytes];
      T numbers[F::kUnit];
      if (!whole) std::memset(tail, 0, sizeof(tail)), std::memcpy(tail, w, bytes), w = tail;
      T* here = whole ? to + at : numbers;
      for (int step = 0; step < F::kUnit / kStepNumbers; ++step, w += F::kStepBytes) {
        Vector part[kStepNumbers / kLanes];
        decode<F>(w, scale, minimum, part);
        for (int v = 0; v < kStepNumbers / kLanes; ++v)
          store(here + step * kStepNumbers + v * kLanes, part[v]);
      }
      if (whole) continue;
      const int64_t low = F::kBits == 4 ? bytes : count;  // A short run's low halves come first.
      std::memcpy(to + at, numbers, low * sizeof(T));
      std::memcpy(to + at + low, numbers + kStepNumbers / 2, (count - low) * sizeof(T));
    }
  }
}
