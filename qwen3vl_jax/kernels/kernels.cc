// Products and attention for few rows: what decoding does, at the speed at which memory is read.
//
// Numbers come in as bfloat16, float16 or float32 and are summed in float32. Each result is computed
// by one thread in one order, which depends on the shape of one row and the instruction set only: not
// on the number of threads, nor on the other rows of the call.

#include <cpuid.h>

#include <string_view>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // Of weight, in a chunk: 5 to 10 us of work.

constexpr int64_t kRowBlock = 1024, kTaskOutputs = 64;  // Of a product of many rows.

enum class InstructionSet { kAvx2, kAvx512 };

// Rows side by side, `step` numbers at a time, zeros after the last. Rows of 4096 bytes would fall on
// the same few lines of the first cache, and on those of the weight.
template <typename T>
std::vector<T> packed(const T* x, int64_t rows, int64_t in, int64_t step) {
  const int64_t steps = (in + step - 1) / step;
  std::vector<T> to(steps * rows * step);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(&to[(s * rows + r) * step], x + r * in + s * step, std::min(step, in - s * step) * sizeof(T));
  return to;
}

template <typename T>
void linear(const XLA_FFI_CallFrame* frame, InstructionSet set, const T* x, Product product) {
  const bool wide = set == InstructionSet::kAvx512;
  const auto rows = packed(x, product.rows, product.in, 2 * (wide ? avx512::kLanes : avx2::kLanes));
  product.x = rows.data();
  const int64_t row_bytes = std::max<int64_t>(product.in * sizeof(T), 1);
  const int64_t outputs = std::max<int64_t>(4, kChunkBytes / row_bytes / 4 * 4);
  const auto compute = wide ? avx512::compute<T> : avx2::compute<T>;
  run(frame, (product.out + outputs - 1) / outputs, [&](int64_t first, int64_t end) {
    compute(product, first * outputs, std::min(end * outputs, product.out));
  });
}

// Strip after strip, so that what is packed stays in the cache: 1.5 MB for kRowBlock rows.
template <typename T>
void many_rows(const XLA_FFI_CallFrame* frame, InstructionSet set, const T* x, const Product& p) {
  const bool wide = set == InstructionSet::kAvx512;
  const int64_t tile = wide ? avx512::kTileRows : avx2::kTileRows;
  const auto pack = wide ? avx512::pack_rows<T> : avx2::pack_rows<T>;
  const auto multiply = wide ? avx512::multiply_strip<T> : avx2::multiply_strip<T>;
  std::vector<float> rows((std::min(kRowBlock, p.rows) + tile - 1) / tile * tile * std::min(kDepth, p.in));
  for (int64_t row = 0; row < p.rows; row += kRowBlock)
    for (int64_t k = 0; k < p.in; k += kDepth) {
      const Strip s{rows.data(), static_cast<const T*>(p.w) + k, p.y + row * p.out, std::min(kRowBlock, p.rows - row),
                    p.in, p.out, std::min(kDepth, p.in - k), k > 0};
      run(frame, (s.rows + tile - 1) / tile, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * tile; first < std::min(end * tile, s.rows); first += tile)
          pack(x + (row + first) * p.in + k, p.in, std::min(tile, s.rows - first), s.depth, &rows[first * s.depth]);
      });
      run(frame, (p.out + kTaskOutputs - 1) / kTaskOutputs, [&](int64_t first, int64_t end) {
        multiply(s, first * kTaskOutputs, std::min(end * kTaskOutputs, p.out));
      });
    }
}

template <typename T>
void attention(const XLA_FFI_CallFrame* frame, InstructionSet set, int64_t heads, int64_t key_heads,
               const Attention& all) {
  const bool wide = set == InstructionSet::kAvx512;
  const auto attend = wide ? avx512::attend<T> : avx2::attend<T>;
  for_each(frame, heads, [&](int64_t head) {
    const int64_t queries = head * all.groups * all.size, keys = head * all.slots * all.size;
    const auto rows = packed(static_cast<const T*>(all.queries) + queries, all.groups, all.size,
                             2 * (wide ? avx512::kLanes : avx2::kLanes));
    Attention one = all;
    one.queries = rows.data();
    one.keys = static_cast<const T*>(all.keys) + keys;
    one.values = static_cast<const T*>(all.values) + keys;
    one.seen = all.seen + head / key_heads * all.slots;
    one.mixed = all.mixed + queries;
    attend(one);
  });
}

bool shaped(const XLA_FFI_Buffer* buffer, XLA_FFI_DataType dtype, std::initializer_list<int64_t> dims) {
  return buffer->dtype == dtype && buffer->rank == int64_t(dims.size()) &&
         std::equal(dims.begin(), dims.end(), buffer->dims);
}

template <typename T>
void product(const XLA_FFI_CallFrame* frame, InstructionSet set, bool many, const void* x, const Product& p) {
  if (many)
    many_rows(frame, set, static_cast<const T*>(x), p);
  else
    linear(frame, set, static_cast<const T*>(x), p);
}

XLA_FFI_Error* handle_product(XLA_FFI_CallFrame* frame, InstructionSet set, bool many) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 2 || frame->rets.size != 1) return failure(frame->api, "linear: x, w -> y");
  const auto* x = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* w = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* y = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (x->rank != 2 || w->rank != 2 || !shaped(w, x->dtype, {w->dims[0], x->dims[1]}) ||
      !shaped(y, XLA_FFI_DataType_F32, {x->dims[0], w->dims[0]}))
    return failure(frame->api, "linear: x [rows, in] and w [out, in] of one dtype, y float32 [rows, out]");
  const Product p{nullptr, w->data, static_cast<float*>(y->data), x->dims[0], x->dims[1], w->dims[0]};
  switch (x->dtype) {
    case XLA_FFI_DataType_BF16:
      product<Bfloat16>(frame, set, many, x->data, p);
      return nullptr;
    case XLA_FFI_DataType_F16:
      product<Float16>(frame, set, many, x->data, p);
      return nullptr;
    case XLA_FFI_DataType_F32:
      product<float>(frame, set, many, x->data, p);
      return nullptr;
    default:
      return failure(frame->api, "linear: bfloat16, float16 or float32");
  }
}

XLA_FFI_Error* handle_attention(XLA_FFI_CallFrame* frame, InstructionSet set) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 4 || frame->rets.size != 1)
    return failure(frame->api, "attention: queries, keys, values, seen -> mixed");
  const auto* queries = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* keys = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* values = static_cast<XLA_FFI_Buffer*>(frame->args.args[2]);
  const auto* seen = static_cast<XLA_FFI_Buffer*>(frame->args.args[3]);
  const auto* mixed = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (queries->rank != 3 || keys->rank != 3 || seen->rank != 2)
    return failure(frame->api, "attention: queries and keys of rank 3, seen of rank 2");
  const int64_t heads = queries->dims[0], groups = queries->dims[1], size = queries->dims[2],
                slots = keys->dims[1], batch = seen->dims[0];
  if (batch == 0 || heads % batch != 0 || !shaped(keys, queries->dtype, {heads, slots, size}) ||
      !shaped(values, queries->dtype, {heads, slots, size}) ||
      !shaped(seen, XLA_FFI_DataType_PRED, {batch, slots}) ||
      !shaped(mixed, XLA_FFI_DataType_F32, {heads, groups, size}))
    return failure(frame->api, "attention: queries [BK, G, D], keys and values [BK, S, D] of one dtype, "
                               "seen [B, S] bool, mixed [BK, G, D] float32");
  const Attention all{queries->data, keys->data, values->data, static_cast<const bool*>(seen->data),
                      static_cast<float*>(mixed->data), groups, slots, size, size};
  const int64_t key_heads = heads / batch;
  switch (queries->dtype) {
    case XLA_FFI_DataType_BF16:
      attention<Bfloat16>(frame, set, heads, key_heads, all);
      return nullptr;
    case XLA_FFI_DataType_F16:
      attention<Float16>(frame, set, heads, key_heads, all);
      return nullptr;
    case XLA_FFI_DataType_F32:
      attention<float>(frame, set, heads, key_heads, all);
      return nullptr;
    default:
      return failure(frame->api, "attention: bfloat16, float16 or float32");
  }
}

// Rows into an array that is also the result: XLA:CPU would write all of a bfloat16 one anew.
XLA_FFI_Error* handle_put_rows(XLA_FFI_CallFrame* frame) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 3 || frame->rets.size != 1) return failure(frame->api, "put rows: array, rows, start -> array");
  const auto* array = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* rows = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* start = static_cast<XLA_FFI_Buffer*>(frame->args.args[2]);
  const auto* result = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  constexpr auto kType = XLA_FFI_DataType_BF16;
  if (array->rank != 3 || rows->rank != 3 || rows->dims[1] > array->dims[1] || !shaped(start, XLA_FFI_DataType_S32, {}) ||
      !shaped(rows, kType, {array->dims[0], rows->dims[1], array->dims[2]}) ||
      !shaped(array, kType, {array->dims[0], array->dims[1], array->dims[2]}) ||
      !shaped(result, kType, {array->dims[0], array->dims[1], array->dims[2]}))
    return failure(frame->api, "put rows: array [N, S, W] and rows [N, T, W] in bfloat16, start int32");
  const int64_t slots = array->dims[1], count = rows->dims[1], bytes = array->dims[2] * sizeof(Bfloat16);
  const int64_t first = std::clamp<int64_t>(*static_cast<const int32_t*>(start->data), 0, slots - count);
  auto* to = static_cast<uint8_t*>(result->data);
  const auto* from = static_cast<const uint8_t*>(rows->data);
  if (result->data != array->data) std::memcpy(to, array->data, array->dims[0] * slots * bytes);
  for (int64_t n = 0; n < array->dims[0]; ++n)
    std::memcpy(to + (n * slots + first) * bytes, from + n * count * bytes, count * bytes);
  return nullptr;
}

#include "encoded.h"

}  // namespace

extern "C" {

int qwen3vl_has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

int qwen3vl_has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") != 0;
}

// AVX512-BF16 or AMX-BF16: XLA then multiplies bfloat16 faster than float32, else more slowly.
int qwen3vl_multiplies_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const bool tiles = d >> 22 & 1;
  return tiles || (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1));
}

XLA_FFI_Error* qwen3vl_put_rows(XLA_FFI_CallFrame* frame) { return handle_put_rows(frame); }

XLA_FFI_Error* qwen3vl_linear_avx2(XLA_FFI_CallFrame* frame) {
  return handle_product(frame, InstructionSet::kAvx2, /*many=*/false);
}

XLA_FFI_Error* qwen3vl_many_rows_avx2(XLA_FFI_CallFrame* frame) {
  return handle_product(frame, InstructionSet::kAvx2, /*many=*/true);
}

XLA_FFI_Error* qwen3vl_linear_avx512(XLA_FFI_CallFrame* frame) {
  return handle_product(frame, InstructionSet::kAvx512, /*many=*/false);
}

XLA_FFI_Error* qwen3vl_many_rows_avx512(XLA_FFI_CallFrame* frame) {
  return handle_product(frame, InstructionSet::kAvx512, /*many=*/true);
}

XLA_FFI_Error* qwen3vl_attention_avx2(XLA_FFI_CallFrame* frame) {
  return handle_attention(frame, InstructionSet::kAvx2);
}

XLA_FFI_Error* qwen3vl_attention_avx512(XLA_FFI_CallFrame* frame) {
  return handle_attention(frame, InstructionSet::kAvx512);
}

XLA_FFI_Error* qwen3vl_encoded_avx2(XLA_FFI_CallFrame* frame) { return handle_encoded(frame); }

XLA_FFI_Error* qwen3vl_encoded_avx512(XLA_FFI_CallFrame* frame) { return handle_encoded(frame); }

XLA_FFI_Error* qwen3vl_encoded_attention_avx2(XLA_FFI_CallFrame* frame) {
  return handle_encoded_attention(frame, InstructionSet::kAvx2);
}

XLA_FFI_Error* qwen3vl_encoded_attention_avx512(XLA_FFI_CallFrame* frame) {
  return handle_encoded_attention(frame, InstructionSet::kAvx512);
}

XLA_FFI_Error* qwen3vl_decoded_avx2(XLA_FFI_CallFrame* frame) {
  return handle_decoded(frame, InstructionSet::kAvx2);
}

XLA_FFI_Error* qwen3vl_decoded_avx512(XLA_FFI_CallFrame* frame) {
  return handle_decoded(frame, InstructionSet::kAvx512);
}

}  // extern "C"
