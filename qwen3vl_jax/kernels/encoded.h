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

// [units, rows, unit] in float32, zeros after the last; a last short run of int4 in its own order.
template <typename T>
std::vector<float> widened_rows(const T* x, int64_t rows, int64_t in, InstructionSet set, bool nibbles) {
  const int64_t unit = nibbles ? Int4::kUnit : Int8::kUnit;
  const int64_t units = (in + unit - 1) / unit;
  const auto widen = set == InstructionSet::kAvx512 ? avx512::widened<T> : avx2::widened<T>;
  std::vector<float> to(units * rows * unit);
  for (int64_t u = 0; u < units; ++u)
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + r * in + u * unit;
      float* at = &to[(u * rows + r) * unit];
      const int64_t count = std::min(unit, in - u * unit);
      const int64_t low = nibbles && count < unit ? (count + 1) / 2 : count;
      widen(from, low, at);
      if (low < count) widen(from + low, count - low, at + unit / 2);
    }
  return to;
}

// The same of `rows` rows of a buffer from row `first` on; empty for a dtype that is none of ours.
std::vector<float> widened_rows(const XLA_FFI_Buffer* x, int64_t first, int64_t rows, InstructionSet set, bool nibbles) {
  const int64_t in = x->dims[x->rank - 1], at = first * in;
  switch (x->dtype) {
    case XLA_FFI_DataType_BF16: return widened_rows(static_cast<const Bfloat16*>(x->data) + at, rows, in, set, nibbles);
    case XLA_FFI_DataType_F16: return widened_rows(static_cast<const Float16*>(x->data) + at, rows, in, set, nibbles);
    case XLA_FFI_DataType_F32: return widened_rows(static_cast<const float*>(x->data) + at, rows, in, set, nibbles);
    default: return {};
  }
}

XLA_FFI_Error* handle_encoded(XLA_FFI_CallFrame* frame, InstructionSet set) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 2 || frame->rets.size != 1) return failure(frame->api, "encoded: x, w -> y");
  const auto* x = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* w = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* y = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (x->rank != 2 || w->rank != 2 || w->dtype != XLA_FFI_DataType_U8 ||
      !shaped(y, XLA_FFI_DataType_F32, {x->dims[0], w->dims[0]}))
    return failure(frame->api, "encoded: x [rows, in], w uint8 [out, bytes], y float32 [rows, out]");
  Form form;
  Encoded e{nullptr, static_cast<const uint8_t*>(w->data), static_cast<float*>(y->data),
            x->dims[0], x->dims[1], w->dims[0], w->dims[1]};
  if (const char* wrong = describe(frame, form, e)) return failure(frame->api, wrong);
  const auto rows = widened_rows(x, 0, e.rows, set, form != Form::kInt8);
  if (rows.empty() && e.rows > 0) return failure(frame->api, "encoded: x in bfloat16, float16 or float32");
  e.x = rows.data();
  void (*compute)(const Encoded&, int64_t, int64_t) = nullptr;
  with_form(form, [&](auto kind) {
    using F = decltype(kind);
    compute = set == InstructionSet::kAvx512 ? avx512::encoded_product<F> : avx2::encoded_product<F>;
  });
  const int64_t outputs = std::max<int64_t>(4, kChunkBytes / e.row_bytes / 4 * 4);
  run(frame, (e.out + outputs - 1) / outputs, [&](int64_t chunk) {
    compute(e, chunk * outputs, std::min((chunk + 1) * outputs, e.out));
  });
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
  run(frame, (e.out + outputs - 1) / outputs, [&](int64_t chunk) {
    const int64_t first = chunk * outputs;
    compute(e, start + first, start + std::min(first + outputs, e.out), tile + first * e.in);
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
  Encoded e{nullptr, static_cast<const uint8_t*>(w->data), nullptr, 0, tile->dims[1], tile->dims[0], w->dims[1]};
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
  if (queries->dtype != XLA_FFI_DataType_BF16 && queries->dtype != XLA_FFI_DataType_F16 &&
      queries->dtype != XLA_FFI_DataType_F32)
    return failure(frame->api, "encoded attention: queries in bfloat16, float16 or float32");
  const auto attend = set == InstructionSet::kAvx512 ? avx512::attend<Code> : avx2::attend<Code>;
  run(frame, heads, [&](int64_t head) {
    const auto rows = widened_rows(queries, head * groups, groups, set, false);
    attend(Attention{rows.data(), static_cast<const uint8_t*>(keys->data) + head * slots * row,
                     static_cast<const uint8_t*>(values->data) + head * slots * row,
                     static_cast<const bool*>(seen->data) + head / (heads / batch) * slots,
                     static_cast<float*>(mixed->data) + head * groups * size, groups, slots, size, row});
  });
  return nullptr;
}
