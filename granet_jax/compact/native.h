// What the kernels for live weights share: vectors, threads, transposition, lists.
//
// Vectors are those of GCC and Clang, so that one source serves AVX-512, AVX2 and NEON. Sums are
// added up in one order whatever the number of threads. Indices are checked before they are used.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(ONE_TARGET)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define WIDEST "x86-64-v4"
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define WIDEST "avx512f"
#endif
#else
#define CLONES
#endif

namespace {

using V4 = float __attribute__((vector_size(16), aligned(4)));
using V8 = float __attribute__((vector_size(32), aligned(4)));
using V16 = float __attribute__((vector_size(64), aligned(4)));

constexpr int64_t kTile = 512;  // inputs that a product goes through before the next; native.py too

template <class V>
INLINE V Load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
INLINE void Store(float* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// --- Threads ---

// Runs f(0), ..., f(count - 1) on the pool. The caller works as well and waits for nothing but
// calls that have begun, so that a busy pool cannot stop it.
template <class F>
void Parallel(ffi::ThreadPool& pool, int64_t count, const F& f) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, &f] {
    int64_t mine = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++mine) f(i);
    if (mine > 0 && state->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all_done.notify_all();
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

struct alignas(64) Line {  // of a cache
  char bytes[64];
};

// Memory of a thread that stays for its next call, for new pages cost more than the work on them.
template <class T, int kPurpose>
T* Scratch(int64_t size) {
  static thread_local std::vector<Line> memory;
  const size_t lines = (size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
  if (memory.size() < lines) memory.resize(lines);
  return reinterpret_cast<T*>(memory.data());
}

// --- Transposition ---

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

INLINE void Transpose16(V16* r) {
#define STAGE(S, ...)                                       \
  for (int i = 0; i < 16; ++i) {                            \
    if (i & S) continue;                                    \
    const V16 a = r[i], b = r[i + S];                       \
    __VA_ARGS__                                             \
  }
  STAGE(1, r[i] = SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        r[i + 1] = SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);)
  STAGE(2, r[i] = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        r[i + 2] = SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);)
  STAGE(4, r[i] = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        r[i + 4] = SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);)
  STAGE(8, r[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        r[i + 8] = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);)
#undef STAGE
}

// --- Sums of vectors ---

INLINE V4 Fold(V16 a) {
  V8 b[2];
  std::memcpy(b, &a, sizeof(a));
  const V8 c = b[0] + b[1];
  V4 d[2];
  std::memcpy(d, &c, sizeof(c));
  return d[0] + d[1];
}

INLINE V4 SumsOf4(V16 a, V16 b, V16 c, V16 d) {
  const V4 p = Fold(a), q = Fold(b), r = Fold(c), s = Fold(d);
  const V4 ab = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7);
  const V4 cd = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
  return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// --- Lists ---

using Int32s = ffi::Buffer<ffi::S32, 1>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Floats = ffi::Buffer<ffi::F32, 1>;

int64_t Tiles(int64_t inputs) { return (inputs + kTile - 1) / kTile; }

ffi::Error Invalid(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

// Whether the lists of a layer end where they may; where not, the message.
const char* CheckEnds(const Int32s& ends, const Int32s& places, const Int32s& slots,
                      int64_t inputs, int64_t outputs) {
  const int64_t num = ends.dimensions()[0];
  if (num != Tiles(inputs) * outputs + 1) return "granet_jax: lists of a layer of another shape";
  if (places.dimensions()[0] != slots.dimensions()[0]) return "granet_jax: lists of two lengths";
  const int32_t* end = ends.typed_data();
  if (end[0] != 0 || end[num - 1] > places.dimensions()[0])
    return "granet_jax: lists that end beyond their entries";
  bool falls = false;
  for (int64_t i = 1; i < num; ++i) falls |= end[i] < end[i - 1];
  return falls ? "granet_jax: lists that end before they begin" : nullptr;
}

constexpr char kOutside[] = "granet_jax: lists with places or slots that the layer has not";

// Whether some of the entries [begin, end) of lists lie outside of the layer.
bool AreOutside(const Int32s& places, const Int32s& slots, int64_t begin, int64_t end,
                int64_t inputs, int64_t capacity) {
  uint32_t place = 0, slot = 0;
  for (int64_t k = begin; k < end; ++k) {
    place = std::max(place, static_cast<uint32_t>(places.typed_data()[k]));
    slot = std::max(slot, static_cast<uint32_t>(slots.typed_data()[k]));
  }
  return begin < end && (place >= inputs || slot >= capacity);
}

int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
