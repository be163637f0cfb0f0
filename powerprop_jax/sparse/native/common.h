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
#include <utility>

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
#if defined(__clang__) || __GNUC__ >= 12
#define POWERPROP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
template <int kSize>
struct Places {
  typedef int32_t Type __attribute__((vector_size(4 * kSize)));
};
#define POWERPROP_SHUFFLE(a, b, ...) \
  __builtin_shuffle(                 \
      a, b, typename Places<sizeof(a) / sizeof(float)>::Type{__VA_ARGS__})
#endif

// A block of kSize rows and columns, turned in steps: blocks of two by two,
// whose entries are blocks themselves, of kSpan rows and columns.
template <int kSize>
struct Block {
  using Vector = typename Lanes<kSize>::Type;
  using Order = std::make_integer_sequence<int, kSize>;

  // Of each pair of spans, the first one of a and the first one of b.
  template <int kSpan, int... kLane>
  static Vector Firsts(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
    return POWERPROP_SHUFFLE(
        a, b, (kLane & kSpan ? kSize + (kLane ^ kSpan) : kLane)...);
  }

  // The last one of a and the last one of b.
  template <int kSpan, int... kLane>
  static Vector Lasts(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
    return POWERPROP_SHUFFLE(
        a, b, (kLane & kSpan ? kSize + kLane : kLane | kSpan)...);
  }

  template <int kSpan>
  static void Turn(Vector* rows) {
    if constexpr (kSpan > 0) {
      for (int i = 0; i < kSize; ++i) {
        if (i & kSpan) continue;
        const Vector a = rows[i], b = rows[i + kSpan];
        rows[i] = Firsts<kSpan>(a, b, Order());
        rows[i + kSpan] = Lasts<kSpan>(a, b, Order());
      }
      Turn<kSpan / 2>(rows);
    }
  }

  // Makes the first row the sums of all.
  template <int kSpan>
  static void Add(Vector* rows) {
    if constexpr (kSpan > 0) {
      for (int i = 0; i < kSpan; ++i) {
        const Vector a = rows[i], b = rows[i + kSpan];
        rows[i] = Firsts<kSpan>(a, b, Order()) + Lasts<kSpan>(a, b, Order());
      }
      Add<kSpan / 2>(rows);
    }
  }
};

// What fits into the registers of this processor.
#if defined(__AVX512F__)
constexpr int kTurned = 16;
#else
constexpr int kTurned = 4;
#endif

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows and j <
// columns, at most kBlock of each.
inline void Turn(const float* from, int64_t from_stride, int64_t rows,
                 int64_t columns, float* to, int64_t to_stride) {
  if (rows == kBlock && columns == kBlock) {
    Block<kTurned>::Vector block[kTurned];
    for (int64_t j = 0; j < kBlock; j += kTurned) {
      for (int64_t i = 0; i < kBlock; i += kTurned) {
        for (int64_t k = 0; k < kTurned; ++k) {
          std::memcpy(&block[k], from + (i + k) * from_stride + j,
                      sizeof(block[k]));
        }
        Block<kTurned>::Turn<kTurned / 2>(block);
        for (int64_t k = 0; k < kTurned; ++k) {
          std::memcpy(to + (j + k) * to_stride + i, &block[k],
                      sizeof(block[k]));
        }
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

// The sums of sixteen vectors, which are lost.
inline Lanes<16>::Type Sums(Lanes<16>::Type* v) {
#if defined(__AVX512F__)
  Block<16>::Add<8>(v);
  return v[0];
#else
  Lanes<16>::Type sums;
  for (int i = 0; i < 16; ++i) sums[i] = Sum(v[i]);
  return sums;
#endif
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
