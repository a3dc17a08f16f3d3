// What a handler needs of XLA: its thread pool, errors, and the answer to its first question.
//
// Written against XLA's C interface (c_api.h) and not ffi.h: that compiles in two seconds, not in ten.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/c_api.h"

inline void destroy(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

inline int64_t pool_threads(const XLA_FFI_CallFrame* frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr,
                                          frame->ctx, &count};
  if (XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) {
    destroy(frame->api, error);
    return 1;
  }
  return count;
}

// What the threads of one call share. A thread takes half of its share of the chunks that are left,
// in one piece: what it reads ahead is then its own (int8 codes: 26 GB/s where single chunks of 128 KB
// gave 23). Threads that come late find none and leave.
struct Work {
  std::function<void(int64_t, int64_t)> compute;
  int64_t chunks, threads;
  std::atomic<int64_t> taken{0}, done{0};

  void help() {
    for (int64_t first = taken.load(std::memory_order_relaxed); first < chunks;) {
      const int64_t count = std::max<int64_t>(1, (chunks - first) / (2 * threads));
      if (!taken.compare_exchange_weak(first, first + count, std::memory_order_relaxed)) continue;
      compute(first, first + count);
      done.fetch_add(count, std::memory_order_release);
      first = taken.load(std::memory_order_relaxed);
    }
  }
};

inline void help_later(void* data) {
  std::unique_ptr<std::shared_ptr<Work>> work(static_cast<std::shared_ptr<Work>*>(data));
  (*work)->help();
}

// compute(first, end) for all of 0 .. chunks - 1, on this thread and on XLA's own pool, so that no
// second pool competes for the cores. It waits only for chunks that a thread has begun: a busy pool makes it slow, never stuck.
inline void run(const XLA_FFI_CallFrame* frame, int64_t chunks, std::function<void(int64_t, int64_t)> compute) {
  auto work = std::make_shared<Work>();
  work->compute = std::move(compute);
  work->chunks = chunks;
  work->threads = std::max<int64_t>(1, std::min(pool_threads(frame), chunks));
  const int64_t helpers = work->threads - 1;
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

// The same one at a time.
template <typename Compute>
void for_each(const XLA_FFI_CallFrame* frame, int64_t chunks, const Compute& compute) {
  run(frame, chunks, [&](int64_t first, int64_t end) {
    for (; first < end; ++first) compute(first);
  });
}

inline XLA_FFI_Error* failure(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                 XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return api->XLA_FFI_Error_Create(&args);
}

inline bool answers_metadata(const XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return true;
}
