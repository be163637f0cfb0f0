// What the kernels share: threads, memory, vectors, turned blocks.

#ifndef POWERPROP_JAX_SPARSE_NATIVE_COMMON_H_
#define POWERPROP_JAX_SPARSE_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace powerprop {

namespace ffi = xla::ffi;

// What programs pass to the kernels and get from them.
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatResult = ffi::ResultBuffer<ffi::F32>;
using IntResult = ffi::ResultBuffer<ffi::S32>;

// The threads of the program, under a name of ours, so that handlers are bound
// by their signatures.
struct Threads : ffi::ThreadPool {
  Threads(ffi::ThreadPool pool) : ffi::ThreadPool(pool) {}
};

// Numbers that are added and multiplied together; compilers make several
// instructions of one where a processor has narrower ones.
template <int kSize>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float Type __attribute__((vector_size(16)));
};
template <>
struct Lanes<8> {
  typedef float Type __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
  typedef float Type __attribute__((vector_size(64)));
};

inline float Sum(Lanes<4>::Type v) { return (v[0] + v[1]) + (v[2] + v[3]); }

inline float Sum(Lanes<8>::Type v) {
  Lanes<4>::Type halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return Sum(halves[0] + halves[1]);
}

inline float Sum(Lanes<16>::Type v) {
  Lanes<8>::Type halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return Sum(halves[0] + halves[1]);
}

// Rows and columns of a block that is turned at a time: a cache line each way.
constexpr int64_t kBlock = 16;

// Numbers of two vectors in another order; compilers differ in the name.
#if defined(__clang__)
#define POWERPROP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define POWERPROP_SHUFFLE(a, b, ...) \
  __builtin_shuffle(a, b, FourPlaces{__VA_ARGS__})
#endif

// Four rows and columns: to[j * to_stride + i] = from[i * from_stride + j].
inline void TurnFour(const float* from, int64_t from_stride, float* to,
                     int64_t to_stride) {
  using Four = Lanes<4>::Type;
  Four rows[4];
  for (int64_t i = 0; i < 4; ++i) {
    std::memcpy(&rows[i], from + i * from_stride, sizeof(Four));
  }
  const Four a = POWERPROP_SHUFFLE(rows[0], rows[2], 0, 4, 1, 5);
  const Four b = POWERPROP_SHUFFLE(rows[1], rows[3], 0, 4, 1, 5);
  const Four c = POWERPROP_SHUFFLE(rows[0], rows[2], 2, 6, 3, 7);
  const Four d = POWERPROP_SHUFFLE(rows[1], rows[3], 2, 6, 3, 7);
  const Four turned[4] = {
      POWERPROP_SHUFFLE(a, b, 0, 4, 1, 5), POWERPROP_SHUFFLE(a, b, 2, 6, 3, 7),
      POWERPROP_SHUFFLE(c, d, 0, 4, 1, 5), POWERPROP_SHUFFLE(c, d, 2, 6, 3, 7)};
  for (int64_t j = 0; j < 4; ++j) {
    std::memcpy(to + j * to_stride, &turned[j], sizeof(Four));
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows and j <
// columns, at most kBlock of each.
inline void Turn(const float* from, int64_t from_stride, int64_t rows,
                 int64_t columns, float* to, int64_t to_stride) {
  if (rows == kBlock && columns == kBlock) {
    for (int64_t j = 0; j < kBlock; j += 4) {
      for (int64_t i = 0; i < kBlock; i += 4) {
        TurnFour(from + i * from_stride + j, from_stride,
                 to + j * to_stride + i, to_stride);
      }
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

// Floats that must be touched for another thread to be worth waking.
constexpr int64_t kWorkPerThread = 60000;

// Threads that are worth using for so much work, at least one.
inline int64_t NumThreads(ffi::ThreadPool& pool, int64_t work) {
  return std::min(std::max<int64_t>(pool.num_threads(), 1),
                  1 + work / kWorkPerThread);
}

// Runs task(0) to task(count - 1), the caller among those who do it. Nobody
// waits for a thread that has not begun, so that calls within calls, or more of
// them at a time than threads, cannot wait for each other for ever.
inline void RunInParallel(ffi::ThreadPool& pool, int64_t threads,
                          int64_t count,
                          const std::function<void(int64_t)>& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
  };
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto shared = std::make_shared<Shared>();
  // Late threads look only at `shared`, which they own too.
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      if (shared->finished.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->all_finished.notify_all();
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(std::function<void()>(work));
  work();
  for (int spin = 0; spin < 20000; ++spin) {
    if (shared->finished.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_finished.wait(
      lock, [&] { return shared->finished.load() == count; });
}

// Memory of a calling thread, kept from call to call: fresh pages would cost
// more than what is put into them.
inline float* Scratch(int which, int64_t size) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[which];
  if (buffer.size < size) {
    std::free(buffer.data);
    const size_t bytes = ((size * sizeof(float) + 63) / 64) * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace powerprop

template <>
struct xla::ffi::CtxBinding<powerprop::Threads> {
  using Ctx = xla::ffi::ThreadPool;
};

#endif  // POWERPROP_JAX_SPARSE_NATIVE_COMMON_H_
