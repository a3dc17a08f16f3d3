// Handlers for weights and caches stored as int8 or int4 codes, packed row by row:
//
//   int8  `in` codes from -127 to 127, then float32 scales: number = code * scale.
//   int4  runs of 32 numbers, 16 bytes each: byte b holds number b low and number 16 + b high. A last
//         run of m numbers is h = ceil(m / 2) bytes: number b low, number h + b high. Then for each
//         group a float16 scale, number = (code - 8) * scale, or a float16 scale and a float16
//         minimum, number = code * scale + minimum.
//
// Included by kernels.cc only.

struct Attributes {
  int64_t bits = -1, group = -1, zero = -1;
};

bool read_attributes(const XLA_FFI_CallFrame* frame, Attributes& to) {
  const std::pair<const char*, int64_t*> wanted[] = {{"bits", &to.bits}, {"group", &to.group}, {"zero", &to.zero}};
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    const XLA_FFI_ByteSpan* name = frame->attrs.names[i];
    const auto* scalar = static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i]);
    for (const auto& [text, value] : wanted)
      if (std::string_view(name->ptr, name->len) == text && frame->attrs.types[i] == XLA_FFI_AttrType_SCALAR &&
          scalar->dtype == XLA_FFI_DataType_S64)
        *value = *static_cast<const int64_t*>(scalar->value);
  }
  return to.bits >= 0 && to.group >= 0 && to.zero >= 0;
}

// Fills in what follows from the attributes and `in`; null, or what is wrong.
const char* describe(const XLA_FFI_CallFrame* frame, Form& form, Encoded& e) {
  Attributes a;
  if (!read_attributes(frame, a)) return "encoded: int64 attributes bits, group and zero";
  const bool nibbles = a.bits == 4, whole_row = a.group == 0;
  const int64_t unit = nibbles ? Int4::kUnit : Int8::kUnit;
  if (!(nibbles || a.bits == 8) || a.zero > 1 || a.group > e.in + 128 || (a.zero == 1 && !nibbles) || (whole_row && nibbles))
    return "encoded: 8 bits, or 4 bits in groups of a row with a minimum (zero = 1) or without (zero = 0)";
  while (!whole_row && unit << e.group_shift < a.group) ++e.group_shift;
  if (!whole_row && unit << e.group_shift != a.group)
    return "encoded: groups of 64, 128 ... int8 numbers or 32, 64 ... int4 numbers, or int8 of a whole row (0)";
  form = nibbles ? (a.zero ? Form::kInt4Zero : Form::kInt4) : Form::kInt8;
  e.code_bytes = nibbles ? (e.in + 1) / 2 : e.in;
  e.terms = (whole_row ? 1 : (e.in + a.group - 1) / a.group) * (1 + a.zero);
  if (whole_row) e.group_shift = kWholeRow;
  if (e.in < 1 || e.row_bytes != e.code_bytes + e.terms * (nibbles ? 2 : 4))
    return "encoded: a packed row has not as many bytes as its numbers and terms take";
  return nullptr;
}

// Calls what(F{}) with the form as a type.
template <typename What>
void with_form(Form form, What what) {
  switch (form) {
    case Form::kInt8: return what(Int8{});
    case Form::kInt4: return what(Int4{});
    case Form::kInt4Zero: return what(Int4Zero{});
  }
}

// Numbers of a buffer of bfloat16, float16 or float32 from number `at` on, as float32.
void widen_part(const XLA_FFI_Buffer* x, int64_t at, int64_t count, float* to) {
  switch (x->dtype) {
    case XLA_FFI_DataType_BF16: return avx2::widened(static_cast<const Bfloat16*>(x->data) + at, count, to);
    case XLA_FFI_DataType_F16: return avx2::widened(static_cast<const Float16*>(x->data) + at, count, to);
    default: return avx2::widened(static_cast<const float*>(x->data) + at, count, to);
  }
}

bool widens(const XLA_FFI_Buffer* x) {
  return x->dtype == XLA_FFI_DataType_BF16 || x->dtype == XLA_FFI_DataType_F16 || x->dtype == XLA_FFI_DataType_F32;
}

// What WholeRows points to.
struct RowWords {
  std::vector<int16_t> words;
  std::vector<float> scales, sums;
  int64_t rows, units;

  WholeRows to(float* y) const { return {words.data(), scales.data(), sums.data(), y, rows, units}; }
};

// A span of one row, zeros after the last number; a last short run of int4 in its own order.
template <typename F>
void read_numbers(const XLA_FFI_Buffer* x, int64_t row, int64_t span, float* to) {
  const int64_t in = x->dims[x->rank - 1];
  std::fill(to, to + kSpan, 0.0f);
  for (int64_t first = 0; first < kSpan; first += F::kUnit) {
    const int64_t place = span * kSpan + first, count = std::clamp<int64_t>(in - place, 0, F::kUnit);
    const int64_t low = F::kBits == 4 && count < F::kUnit ? (count + 1) / 2 : count;
    widen_part(x, row * in + place, low, to + first);
    widen_part(x, row * in + place + low, count - low, to + first + F::kUnit / 2);
  }
}

// Rows first .. first + rows of a buffer whose last axis has their numbers.
template <typename F>
RowWords whole_rows(const XLA_FFI_Buffer* x, int64_t first, int64_t rows) {
  const int64_t spans = (x->dims[x->rank - 1] + kSpan - 1) / kSpan, units = (spans * kSpanUnits<F> + 7) / 8 * 8;
  RowWords to{std::vector<int16_t>(spans * rows * kSpan), std::vector<float>(rows * units),
              std::vector<float>(rows * units), rows, units};
  for (int64_t s = 0; s < spans; ++s)
    for (int64_t r = 0; r < rows; ++r) {
      float numbers[kSpan];
      int16_t words[kSpan];
      read_numbers<F>(x, first + r, s, numbers);
      for (int64_t u = 0; u < kSpanUnits<F>; ++u) {
        const int64_t at = r * units + s * kSpanUnits<F> + u;
        to.scales[at] = avx2::whole_numbers(numbers + u * F::kUnit, F::kUnit, words + u * F::kUnit, to.sums[at]);
      }
      int16_t* place = &to.words[(s * rows + r) * kSpan];
      if constexpr (F::kBits == 4)
        avx2::order_as_nibbles(words, place);
      else
        std::memcpy(place, words, sizeof(words));
    }
  return to;
}

template <typename F>
void encoded_product(const XLA_FFI_CallFrame* frame, const Encoded& e, const XLA_FFI_Buffer* x, float* y) {
  const RowWords own = whole_rows<F>(x, 0, x->dims[0]);
  const WholeRows rows = own.to(y);
  const int64_t outputs = std::max<int64_t>(4, kChunkBytes / e.row_bytes / 4 * 4);
  run(frame, (e.out + outputs - 1) / outputs, [&](int64_t first, int64_t end) {
    avx2::integer_product<F>(e, rows, first * outputs, std::min(end * outputs, e.out));
  });
}

XLA_FFI_Error* handle_encoded(XLA_FFI_CallFrame* frame) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 2 || frame->rets.size != 1) return failure(frame->api, "encoded: x, w -> y");
  const auto* x = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* w = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* y = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (x->rank != 2 || w->rank != 2 || w->dtype != XLA_FFI_DataType_U8 ||
      !shaped(y, XLA_FFI_DataType_F32, {x->dims[0], w->dims[0]}))
    return failure(frame->api, "encoded: x [rows, in], w uint8 [out, bytes], y float32 [rows, out]");
  if (!widens(x)) return failure(frame->api, "encoded: x in bfloat16, float16 or float32");
  Form form;
  Encoded e{static_cast<const uint8_t*>(w->data), x->dims[1], w->dims[0], w->dims[1]};
  if (const char* wrong = describe(frame, form, e)) return failure(frame->api, wrong);
  with_form(form, [&](auto kind) { encoded_product<decltype(kind)>(frame, e, x, static_cast<float*>(y->data)); });
  return nullptr;
}

template <typename T>
void decoded_tile(const XLA_FFI_CallFrame* frame, InstructionSet set, Form form, const Encoded& e, int64_t start,
                  T* tile) {
  void (*compute)(const Encoded&, int64_t, int64_t, T*) = nullptr;
  with_form(form, [&](auto kind) {
    using F = decltype(kind);
    compute = set == InstructionSet::kAvx512 ? avx512::decoded_rows<F, T> : avx2::decoded_rows<F, T>;
  });
  const int64_t outputs = std::max<int64_t>(1, kChunkBytes / e.row_bytes / 2);
  run(frame, (e.out + outputs - 1) / outputs, [&](int64_t first, int64_t end) {
    compute(e, start + first * outputs, start + std::min(end * outputs, e.out), tile + first * outputs * e.in);
  });
}

// Rows start .. start + n of a packed w, as numbers [n, in].
XLA_FFI_Error* handle_decoded(XLA_FFI_CallFrame* frame, InstructionSet set) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 2 || frame->rets.size != 1) return failure(frame->api, "decoded: w, start -> tile");
  const auto* w = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* start = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* tile = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (w->rank != 2 || w->dtype != XLA_FFI_DataType_U8 || tile->rank != 2 ||
      !shaped(start, XLA_FFI_DataType_S32, {}))
    return failure(frame->api, "decoded: w uint8 [out, bytes], start int32, tile [n, in]");
  const int64_t first = *static_cast<const int32_t*>(start->data);
  if (first < 0 || first + tile->dims[0] > w->dims[0])
    return failure(frame->api, "decoded: the tile's rows are not all in w");
  Form form;
  Encoded e{static_cast<const uint8_t*>(w->data), tile->dims[1], tile->dims[0], w->dims[1]};
  if (const char* wrong = describe(frame, form, e)) return failure(frame->api, wrong);
  switch (tile->dtype) {
    case XLA_FFI_DataType_BF16:
      decoded_tile(frame, set, form, e, first, static_cast<Bfloat16*>(tile->data));
      return nullptr;
    case XLA_FFI_DataType_F32:
      decoded_tile(frame, set, form, e, first, static_cast<float*>(tile->data));
      return nullptr;
    default:
      return failure(frame->api, "decoded: a tile in bfloat16 or float32");
  }
}

// One token's attention over keys and values whose rows are packed int8, each with one scale.
XLA_FFI_Error* handle_encoded_attention(XLA_FFI_CallFrame* frame, InstructionSet set) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 4 || frame->rets.size != 1)
    return failure(frame->api, "encoded attention: queries, keys, values, seen -> mixed");
  const auto* queries = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* keys = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* values = static_cast<XLA_FFI_Buffer*>(frame->args.args[2]);
  const auto* seen = static_cast<XLA_FFI_Buffer*>(frame->args.args[3]);
  const auto* mixed = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (queries->rank != 3 || keys->rank != 3 || seen->rank != 2)
    return failure(frame->api, "encoded attention: queries and keys of rank 3, seen of rank 2");
  const int64_t heads = queries->dims[0], groups = queries->dims[1], size = queries->dims[2],
                slots = keys->dims[1], batch = seen->dims[0], row = size + int64_t(sizeof(float));
  if (batch == 0 || heads % batch != 0 || !shaped(keys, XLA_FFI_DataType_U8, {heads, slots, row}) ||
      !shaped(values, XLA_FFI_DataType_U8, {heads, slots, row}) ||
      !shaped(seen, XLA_FFI_DataType_PRED, {batch, slots}) ||
      !shaped(mixed, XLA_FFI_DataType_F32, {heads, groups, size}))
    return failure(frame->api, "encoded attention: queries [BK, G, D], keys and values uint8 [BK, S, D + 4], "
                               "seen [B, S] bool, mixed [BK, G, D] float32");
  if (!widens(queries)) return failure(frame->api, "encoded attention: queries in bfloat16, float16 or float32");
  const auto attend = set == InstructionSet::kAvx512 ? avx512::attend<Code> : avx2::attend<Code>;
  for_each(frame, heads, [&](int64_t head) {
    const RowWords own = whole_rows<Int8>(queries, head * groups, groups);
    const WholeRows rows = own.to(nullptr);
    attend(Attention{&rows, static_cast<const uint8_t*>(keys->data) + head * slots * row,
                     static_cast<const uint8_t*>(values->data) + head * slots * row,
                     static_cast<const bool*>(seen->data) + head / (heads / batch) * slots,
                     static_cast<float*>(mixed->data) + head * groups * size, groups, slots, size, row});
  });
  return nullptr;
}
