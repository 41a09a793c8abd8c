// Matrix products with live weights alone, for CPUs, and what an event does to slots and lists.

#include <numeric>

#include "native.h"

namespace {

constexpr int64_t kRows = 32;   // of a batch that are multiplied at once
constexpr int64_t kSampleRows = 64;  // the same in the gradient of slots

struct Entry {
  int32_t place;
  float value;
};

// --- Transposition ---

// `rows` rows of x (row-major, `columns` wide) as columns of out (columns, stride); the rows that
// are lacking become zeros.
CLONES void ToColumns(const float* x, int64_t rows, int64_t columns, float* out, int64_t stride) {
  for (int64_t r = 0; r < stride; r += 16) {
    const int64_t width = std::min<int64_t>(16, stride - r);
    for (int64_t c = 0; c < columns; c += 16) {
      if (width == 16 && r + 16 <= rows && c + 16 <= columns) {
        V16 block[16];
        for (int i = 0; i < 16; ++i) block[i] = Load<V16>(x + (r + i) * columns + c);
        Transpose16(block);
        for (int i = 0; i < 16; ++i) Store(out + (c + i) * stride + r, block[i]);
        continue;
      }
      for (int64_t j = c; j < std::min(c + 16, columns); ++j)
        for (int64_t i = r; i < r + width; ++i)
          out[j * stride + i] = i < rows ? x[i * columns + j] : 0.0f;
    }
  }
}

// Columns [begin, end) of y back from out (end - begin, stride).
CLONES void FromColumns(const float* out, int64_t stride, float* y, int64_t rows, int64_t columns,
                        int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = begin; c < end; c += 16) {
      if (r + 16 <= rows && c + 16 <= end) {
        V16 block[16];
        for (int i = 0; i < 16; ++i) block[i] = Load<V16>(out + (c - begin + i) * stride + r);
        Transpose16(block);
        for (int i = 0; i < 16; ++i) Store(y + (r + i) * columns + c, block[i]);
        continue;
      }
      for (int64_t i = r; i < std::min(r + 16, rows); ++i)
        for (int64_t j = c; j < std::min(c + 16, end); ++j)
          y[i * columns + j] = out[(j - begin) * stride + i];
    }
  }
}

// --- Products ---

// A tile of inputs for some outputs of a block of rows: one weight times all rows at a time.
// `ends` has one number more than outputs; `entries` begins with the first of them.
template <class V, int kVectors>
INLINE void MultiplyBlock(const float* x, float* y, const int32_t* ends, const Entry* entries,
                          int64_t outputs, bool is_first) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float), kStride = kWidth * kVectors;
  const Entry* e = entries;
  for (int64_t o = 0; o < outputs; ++o) {
    float* out = y + o * kStride;
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = is_first ? V{} : Load<V>(out + v * kWidth);
    for (const Entry* last = entries + (ends[o + 1] - ends[0]); e < last; ++e) {
      const float* in = x + e->place * kStride;
      for (int v = 0; v < kVectors; ++v) sum[v] += e->value * Load<V>(in + v * kWidth);
    }
    for (int v = 0; v < kVectors; ++v) Store(out + v * kWidth, sum[v]);
  }
}

CLONES void Multiply32(const float* x, float* y, const int32_t* ends, const Entry* entries,
                       int64_t outputs, bool is_first) {
  MultiplyBlock<V16, 2>(x, y, ends, entries, outputs, is_first);
}

CLONES void Multiply16(const float* x, float* y, const int32_t* ends, const Entry* entries,
                       int64_t outputs, bool is_first) {
  MultiplyBlock<V16, 1>(x, y, ends, entries, outputs, is_first);
}

CLONES void Multiply8(const float* x, float* y, const int32_t* ends, const Entry* entries,
                      int64_t outputs, bool is_first) {
  MultiplyBlock<V8, 1>(x, y, ends, entries, outputs, is_first);
}

// One row: four sums at a time, for each waits for the one before.
CLONES void Multiply1(const float* x, float* y, const int32_t* ends, const Entry* entries,
                      int64_t outputs, bool is_first) {
  const Entry* e = entries;
  for (int64_t o = 0; o < outputs; ++o) {
    const Entry* last = entries + (ends[o + 1] - ends[0]);
    float a = is_first ? 0.0f : y[o], b = 0.0f, c = 0.0f, d = 0.0f;
    for (; e + 4 <= last; e += 4) {
      a += e[0].value * x[e[0].place];
      b += e[1].value * x[e[1].place];
      c += e[2].value * x[e[2].place];
      d += e[3].value * x[e[3].place];
    }
    for (; e < last; ++e) a += e->value * x[e->place];
    y[o] = (a + b) + (c + d);
  }
}

// Adds to sums[k] what a block of rows contributes to entry k, for outputs [begin, end).
template <int kVectors>
INLINE void SampleBlock(const float* x, const float* y, const int32_t* ends, const int32_t* places,
                        float* sums, int64_t tiles, int64_t outputs, int64_t begin, int64_t end) {
  constexpr int64_t kStride = 16 * kVectors;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t o = begin; o < end; ++o) {
      V16 out[kVectors];
      for (int v = 0; v < kVectors; ++v) out[v] = Load<V16>(y + o * kStride + 16 * v);
      auto product = [&](int32_t k) {
        const float* in = x + places[k] * kStride;
        V16 sum = out[0] * Load<V16>(in);
        for (int v = 1; v < kVectors; ++v) sum += out[v] * Load<V16>(in + 16 * v);
        return sum;
      };
      int32_t k = ends[tile * outputs + o];
      const int32_t last = ends[tile * outputs + o + 1];
      for (; k + 4 <= last; k += 4) {
        const V4 four = SumsOf4(product(k), product(k + 1), product(k + 2), product(k + 3));
        Store(sums + k, Load<V4>(sums + k) + four);
      }
      for (; k < last; ++k) {
        const V4 one = Fold(product(k));
        sums[k] += (one[0] + one[2]) + (one[1] + one[3]);
      }
    }
  }
}

CLONES void Sample64(const float* x, const float* y, const int32_t* ends, const int32_t* places,
                     float* sums, int64_t tiles, int64_t outputs, int64_t begin, int64_t end) {
  SampleBlock<4>(x, y, ends, places, sums, tiles, outputs, begin, end);
}

CLONES void Sample16(const float* x, const float* y, const int32_t* ends, const int32_t* places,
                     float* sums, int64_t tiles, int64_t outputs, int64_t begin, int64_t end) {
  SampleBlock<1>(x, y, ends, places, sums, tiles, outputs, begin, end);
}

ffi::Error Multiply(ffi::ThreadPool pool, Matrix x, Floats values, Int32s ends, Int32s places,
                    Int32s slots, ffi::Result<Matrix> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1], tiles = Tiles(inputs);
  if (const char* wrong = CheckEnds(ends, places, slots, inputs, outputs)) return Invalid(wrong);
  if (rows == 0 || outputs == 0) return ffi::Error::Success();
  if (inputs == 0) {
    std::fill_n(y->typed_data(), rows * outputs, 0.0f);
    return ffi::Error::Success();
  }
  const int32_t* end = ends.typed_data();
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), live = end[tiles * outputs];
  const int64_t stride = rows == 1 ? 1 : rows <= 8 ? 8 : rows <= 16 ? 16 : kRows;
  const auto block = stride == 1 ? Multiply1 : stride == 8 ? Multiply8 : stride == 16 ? Multiply16
                                                                                      : Multiply32;
  const int64_t blocks = Ceil(rows, stride), part = Ceil(live, threads);
  float* columns = Scratch<float, 0>(blocks * stride * inputs);
  std::atomic<bool> outside{false};
  Parallel(pool, blocks + threads, [&](int64_t i) {
    if (i < blocks) {
      const int64_t first = i * stride, num = std::min(stride, rows - first);
      ToColumns(x.typed_data() + first * inputs, num, inputs, columns + first * inputs, stride);
    } else {
      const int64_t begin = std::min(live, (i - blocks) * part), last = std::min(live, begin + part);
      if (AreOutside(places, slots, begin, last, inputs, values.dimensions()[0])) outside = true;
    }
  });
  if (outside) return Invalid(kOutside);
  const int64_t chunk = 16 * Ceil(outputs, 16 * 4 * threads), chunks = Ceil(outputs, chunk);
  const int64_t group = 4 * stride;  // rows for which a list is read once
  Parallel(pool, chunks * Ceil(rows, group), [&](int64_t i) {
    const int64_t begin = i % chunks * chunk, num = std::min(outputs, begin + chunk) - begin;
    const int64_t top = i / chunks * group, bottom = std::min(blocks * stride, top + group);
    float* sums = Scratch<float, 1>(group * num);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int32_t* own = end + tile * outputs + begin;
      Entry* entries = Scratch<Entry, 2>(own[num] - own[0]);
      for (int32_t k = own[0]; k < own[num]; ++k)
        entries[k - own[0]] = {places.typed_data()[k], values.typed_data()[slots.typed_data()[k]]};
      for (int64_t r = top; r < bottom; r += stride)
        block(columns + r * inputs, sums + (r - top) * num, own, entries, num, tile == 0);
    }
    for (int64_t r = top; r < bottom; r += stride)
      FromColumns(sums + (r - top) * num, stride, y->typed_data() + r * outputs,
                  std::min(stride, rows - r), outputs, begin, begin + num);
  });
  return ffi::Error::Success();
}

ffi::Error Sample(ffi::ThreadPool pool, Matrix x, Matrix y, Int32s ends, Int32s places,
                  Int32s slots, ffi::Result<Floats> of_slots) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y.dimensions()[1], tiles = Tiles(inputs);
  const int64_t capacity = of_slots->dimensions()[0];
  if (y.dimensions()[0] != rows) return Invalid("granet_jax: inputs and outputs of two batches");
  if (const char* wrong = CheckEnds(ends, places, slots, inputs, outputs)) return Invalid(wrong);
  float* result = of_slots->typed_data();
  std::fill_n(result, capacity, 0.0f);
  if (rows == 0 || inputs == 0 || outputs == 0) return ffi::Error::Success();
  const int32_t* end = ends.typed_data();
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), live = end[tiles * outputs];
  const int64_t stride = rows <= 16 ? 16 : kSampleRows, blocks = Ceil(rows, stride);
  const auto block = stride == 16 ? Sample16 : Sample64;
  const int64_t size = (inputs + outputs) * stride;
  float* columns = Scratch<float, 3>(blocks * size);
  const int64_t part = Ceil(live, threads);
  std::atomic<bool> outside{false};
  Parallel(pool, threads + 2 * blocks, [&](int64_t i) {
    if (i >= 2 * blocks) {
      const int64_t begin = std::min(live, (i - 2 * blocks) * part);
      if (AreOutside(places, slots, begin, std::min(live, begin + part), inputs, capacity))
        outside = true;
      return;
    }
    const int64_t first = i / 2 * stride, num = std::min(stride, rows - first);
    float* out = columns + i / 2 * size + (i % 2 ? inputs * stride : 0);
    const int64_t width = i % 2 ? outputs : inputs;
    ToColumns((i % 2 ? y : x).typed_data() + first * width, num, width, out, stride);
  });
  if (outside) return Invalid(kOutside);
  float* sums = Scratch<float, 4>(live);
  const int64_t chunk = Ceil(outputs, 4 * threads), chunks = Ceil(outputs, chunk);
  Parallel(pool, chunks, [&](int64_t i) {
    const int64_t begin = i * chunk, last = std::min(outputs, begin + chunk);
    for (int64_t t = 0; t < tiles; ++t)
      std::fill(sums + end[t * outputs + begin], sums + end[t * outputs + last], 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* in = columns + b * size;
      block(in, in + inputs * stride, end, places.typed_data(), sums, tiles, outputs, begin, last);
    }
    for (int64_t t = 0; t < tiles; ++t)
      for (int32_t k = end[t * outputs + begin]; k < end[t * outputs + last]; ++k)
        result[slots.typed_data()[k]] = sums[k];
  });
  return ffi::Error::Success();
}

// --- Events ---

using Bools = ffi::Buffer<ffi::PRED, 1>;

// Weights in `keep` keep their slot; those in `masks` alone take the slots that are then free, in
// the order of their index; the other slots are dead.
ffi::Error Reslot(Int32s index, Bools masks, Bools keep, ffi::Result<Int32s> new_index,
                  ffi::Result<Bools> stays, ffi::Result<Int32s> num_outgrown) {
  const int64_t size = masks.dimensions()[0], capacity = index.dimensions()[0];
  if (size == 0 || keep.dimensions()[0] != size) return Invalid("granet_jax: masks of no layer");
  const bool *mask = masks.typed_data(), *kept = keep.typed_data();
  const int32_t* place = index.typed_data();
  // Chance decides which weights these are, so there is nothing to predict: few branches.
  std::vector<int32_t> grown(2 * capacity + 1, static_cast<int32_t>(size));
  int64_t num_grown = 0, i = 0;
  auto look = [&](int64_t j) {
    grown[std::min(num_grown, capacity)] = static_cast<int32_t>(j);
    num_grown += mask[j] & !kept[j];
  };
  for (uint64_t in_masks, in_keep; i + 8 <= size; i += 8) {  // eight bytes of 0 and 1
    std::memcpy(&in_masks, mask + i, 8);
    std::memcpy(&in_keep, kept + i, 8);
    for (in_masks &= ~in_keep; in_masks; in_masks &= in_masks - 1)
      look(i + __builtin_ctzll(in_masks) / 8);
  }
  for (; i < size; ++i) look(i);
  grown[std::min(num_grown, capacity)] = static_cast<int32_t>(size);
  int64_t next = 0;
  for (int64_t s = 0; s < capacity; ++s) {
    const bool inside = static_cast<uint32_t>(place[s]) < static_cast<uint64_t>(size);
    const bool stay = kept[inside ? place[s] : 0] & inside;
    stays->typed_data()[s] = stay;
    new_index->typed_data()[s] = stay ? place[s] : grown[next];
    next += !stay;
  }
  num_outgrown->typed_data()[0] = static_cast<int32_t>(std::max<int64_t>(0, num_grown - next));
  return ffi::Error::Success();
}

// A live weight: its slot, and where it lies in the matrix.
struct Live {
  int32_t slot, input, output;
};

// The lists of a product whose weights come sorted by output of the product, or by input: a
// counting sort by tile of inputs and output, which leaves that order within each list.
template <int32_t Live::*kInput, int32_t Live::*kOutput>
void FillLists(const std::vector<Live>& weights, int64_t outputs, Int32s& ends, Int32s& places,
               Int32s& slots) {
  int32_t* end = ends.typed_data();
  std::fill_n(end, ends.dimensions()[0], 0);
  auto list_of = [&](const Live& w) {
    return static_cast<uint32_t>(w.*kInput) / kTile * outputs + w.*kOutput;
  };
  for (const Live& w : weights) ++end[list_of(w) + 1];
  std::partial_sum(end, end + ends.dimensions()[0], end);
  std::vector<int32_t> next(end, end + ends.dimensions()[0]);
  for (const Live& w : weights) {
    const int32_t k = next[list_of(w)]++;
    places.typed_data()[k] = w.*kInput;
    slots.typed_data()[k] = w.slot;
  }
  const int64_t num = weights.size(), rest = places.dimensions()[0] - num;
  std::fill_n(places.typed_data() + num, rest, 0);
  std::fill_n(slots.typed_data() + num, rest, 0);
}

// The live weights sorted by index: a radix sort.
std::vector<Live> Sorted(const Int32s& index, int64_t inputs, int64_t outputs) {
  const int32_t* place = index.typed_data();
  const int64_t size = inputs * outputs;
  std::vector<int64_t> keys, other;  // index and slot
  keys.reserve(index.dimensions()[0]);
  for (int64_t s = 0; s < index.dimensions()[0]; ++s)
    if (static_cast<uint32_t>(place[s]) < static_cast<uint64_t>(size))
      keys.push_back(static_cast<int64_t>(place[s]) << 32 | s);
  if (!std::is_sorted(keys.begin(), keys.end())) {
    other.resize(keys.size());
    for (int shift = 32; shift < 63 && (size - 1) >> (shift - 32); shift += 11) {
      int64_t starts[2049] = {};
      for (int64_t key : keys) ++starts[(key >> shift & 2047) + 1];
      std::partial_sum(starts, starts + 2049, starts);
      for (int64_t key : keys) other[starts[key >> shift & 2047]++] = key;
      keys.swap(other);
    }
  }
  std::vector<Live> weights;
  weights.reserve(keys.size());
  int64_t input = 0, end = outputs;
  for (int64_t key : keys) {
    for (; key >> 32 >= end; end += outputs) ++input;
    weights.push_back({static_cast<int32_t>(key), static_cast<int32_t>(input),
                       static_cast<int32_t>((key >> 32) - end + outputs)});
  }
  return weights;
}

ffi::Error MakeLists(ffi::ThreadPool pool, Int32s index, int64_t inputs, int64_t outputs,
                     ffi::Result<Int32s> out_ends, ffi::Result<Int32s> out_places,
                     ffi::Result<Int32s> out_slots, ffi::Result<Int32s> in_ends,
                     ffi::Result<Int32s> in_places, ffi::Result<Int32s> in_slots) {
  if (out_ends->dimensions()[0] != Tiles(inputs) * outputs + 1 ||
      in_ends->dimensions()[0] != Tiles(outputs) * inputs + 1)
    return Invalid("granet_jax: lists of a layer of another shape");
  const std::vector<Live> weights = Sorted(index, inputs, outputs);
  Parallel(pool, 2, [&](int64_t i) {
    if (i == 0)
      FillLists<&Live::input, &Live::output>(weights, outputs, *out_ends, *out_places, *out_slots);
    else
      FillLists<&Live::output, &Live::input>(weights, inputs, *in_ends, *in_places, *in_slots);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_multiply, Multiply,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Matrix>()
        .Arg<Floats>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_sample, Sample,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Matrix>()
        .Arg<Matrix>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_reslot, Reslot,
    ffi::Ffi::Bind()
        .Arg<Int32s>()
        .Arg<Bools>()
        .Arg<Bools>()
        .Ret<Int32s>()
        .Ret<Bools>()
        .Ret<Int32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_lists, MakeLists,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Int32s>()
        .Attr<int64_t>("inputs")
        .Attr<int64_t>("outputs")
        .Ret<Int32s>()
        .Ret<Int32s>()
        .Ret<Int32s>()
        .Ret<Int32s>()
        .Ret<Int32s>()
        .Ret<Int32s>());
