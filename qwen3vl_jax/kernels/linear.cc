// y[r, o] = sum_i x[r, i] * w[o, i] for few rows: reads the weight once, at the speed of memory.
//
// x and w share a dtype (bfloat16, float16 or float32), y is float32 and so is every sum. Each output
// is summed by one thread in one order that depends on `in` and the instruction set only: results do
// not depend on the number of threads, nor on the other rows of the call.
//
// Written against XLA's C interface (c_api.h) and not ffi.h: this compiles in one second, not in ten.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"


namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // Of weight, per grab of a thread: 5 to 10 us of work.

enum class InstructionSet { kAvx2, kAvx512 };

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// One product: what every instruction set is asked to do for outputs [begin, end).
struct Product {
  const void* x;  // Packed: [ceil(in / step), rows, step], zeros after `in`.
  const void* w;
  float* y;
  int64_t rows, in, out;
};

namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
constexpr int kLanes = 8, kOutputs = 4, kRows = 3;
using Vector = __m256;
TARGET inline Vector zero() { return _mm256_setzero_ps(); }
TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
TARGET inline float sum(Vector v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
TARGET inline void load(const float* from, Vector& first, Vector& second) {
  first = _mm256_loadu_ps(from);
  second = _mm256_loadu_ps(from + 8);
}
// 16 numbers as 8 words: the even numbers are the low halves, the odd ones the high halves.
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
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f")))
constexpr int kLanes = 16, kOutputs = 4, kRows = 4;
using Vector = __m512;
TARGET inline Vector zero() { return _mm512_setzero_ps(); }
TARGET inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
TARGET inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
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
#undef TARGET
}  // namespace avx512

using Compute = void(const Product&, int64_t begin, int64_t end);

struct Kernel {
  Compute* compute;
  int64_t step;  // Numbers of a row that it takes at a time.
  int64_t itemsize;
};

template <typename T>
Kernel kernel_for(InstructionSet instruction_set) {
  if (instruction_set == InstructionSet::kAvx512)
    return {avx512::compute<T>, 2 * avx512::kLanes, sizeof(T)};
  return {avx2::compute<T>, 2 * avx2::kLanes, sizeof(T)};
}

// The rows of x side by side, `step` numbers at a time. Rows of 4096 bytes would fall on the same few
// lines of the first cache, and on those of the weight. All dtypes have 0 as all bits zero.
std::vector<char> packed(const void* x, int64_t rows, int64_t in, const Kernel& kernel) {
  const int64_t row_bytes = in * kernel.itemsize, step_bytes = kernel.step * kernel.itemsize;
  const int64_t steps = (row_bytes + step_bytes - 1) / step_bytes;
  std::vector<char> to(steps * rows * step_bytes);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(&to[(s * rows + r) * step_bytes], static_cast<const char*>(x) + r * row_bytes + s * step_bytes,
                  std::min(step_bytes, row_bytes - s * step_bytes));
  return to;
}

// What the threads of one call share. Threads that come late find no chunk and leave.
struct Work {
  std::vector<char> x;
  Product product;
  Compute* compute;
  int64_t chunk_outputs, chunks;
  std::atomic<int64_t> taken{0}, done{0};

  void help() {
    for (int64_t chunk; (chunk = taken.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t begin = chunk * chunk_outputs;
      compute(product, begin, std::min(begin + chunk_outputs, product.out));
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

void help_later(void* data) {
  std::unique_ptr<std::shared_ptr<Work>> work(static_cast<std::shared_ptr<Work>*>(data));
  (*work)->help();
}

void destroy(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

int64_t pool_threads(const XLA_FFI_CallFrame* frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr,
                                          frame->ctx, &count};
  if (XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) {
    destroy(frame->api, error);
    return 1;
  }
  return count;
}

// Runs on this thread and on XLA's own pool, so that no second pool competes for the cores. It waits
// only for chunks that a thread has begun: a busy pool makes it slow, never stuck.
void run(const XLA_FFI_CallFrame* frame, const Product& product, const Kernel& kernel) {
  const int64_t row_bytes = product.in * kernel.itemsize;
  auto work = std::make_shared<Work>();
  work->x = packed(product.x, product.rows, product.in, kernel);
  work->product = product;
  work->product.x = work->x.data();
  work->compute = kernel.compute;
  work->chunk_outputs = std::max<int64_t>(4, kChunkBytes / std::max<int64_t>(row_bytes, 1) / 4 * 4);
  work->chunks = (product.out + work->chunk_outputs - 1) / work->chunk_outputs;
  const int64_t helpers = std::min(pool_threads(frame), work->chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto* data = new std::shared_ptr<Work>(work);
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr,
                                          frame->ctx, help_later, data};
    if (XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_Schedule(&args)) {
      destroy(frame->api, error);
      delete data;
      break;
    }
  }
  work->help();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < work->chunks; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

XLA_FFI_Error* failure(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                 XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return api->XLA_FFI_Error_Create(&args);
}

bool answers_metadata(const XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return true;
}

XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, InstructionSet instruction_set) {
  if (answers_metadata(frame)) return nullptr;
  if (frame->args.size != 2 || frame->rets.size != 1)
    return failure(frame->api, "linear takes x and w and returns y");
  const auto* x = static_cast<XLA_FFI_Buffer*>(frame->args.args[0]);
  const auto* w = static_cast<XLA_FFI_Buffer*>(frame->args.args[1]);
  const auto* y = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[0]);
  if (x->rank != 2 || w->rank != 2 || y->rank != 2 || x->dims[1] != w->dims[1] || x->dtype != w->dtype ||
      y->dims[0] != x->dims[0] || y->dims[1] != w->dims[0] || y->dtype != XLA_FFI_DataType_F32)
    return failure(frame->api, "linear takes x [rows, in] and w [out, in] of one dtype; y is float32 [rows, out]");
  const Product product{x->data, w->data, static_cast<float*>(y->data), x->dims[0], x->dims[1], w->dims[0]};
  switch (x->dtype) {
    case XLA_FFI_DataType_BF16:
      run(frame, product, kernel_for<Bfloat16>(instruction_set));
      return nullptr;
    case XLA_FFI_DataType_F16:
      run(frame, product, kernel_for<Float16>(instruction_set));
      return nullptr;
    case XLA_FFI_DataType_F32:
      run(frame, product, kernel_for<float>(instruction_set));
      return nullptr;
    default:
      return failure(frame->api, "linear takes bfloat16, float16 or float32");
  }
}

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

XLA_FFI_Error* qwen3vl_linear_avx2(XLA_FFI_CallFrame* frame) { return handle(frame, InstructionSet::kAvx2); }

XLA_FFI_Error* qwen3vl_linear_avx512(XLA_FFI_CallFrame* frame) {
  return handle(frame, InstructionSet::kAvx512);
}

}  // extern "C"
