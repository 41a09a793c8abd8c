// Convolutions of images with live weights alone, for CPUs: the product and both its gradients.
//
// An image is cut into planes, one for each channel, and a vector of a plane holds one place of 16
// images, or 16 places of one image where there are few. So each live weight is one number times
// some vectors, at a fixed distance from those of the output that it adds to. Steps of a window
// (strides) and gaps between inputs (which gradients of strided convolutions have) sort places by
// their remainders, so that neighbours in memory are neighbours for all weights.

#include <numeric>

#include "native.h"

#define INLINED __attribute__((always_inline))

namespace {

using Images = ffi::Buffer<ffi::F32, 4>;
using Numbers = ffi::Span<const int64_t>;

constexpr int64_t kLanes = 16;            // floats of a vector
constexpr int64_t kFewImages = 12;        // fewer than these lie one after the other
constexpr int64_t kFits = 768 * 1024;     // bytes of inputs and outputs that are worked on at once
constexpr int64_t kFitsFirst = 24 * 1024;  // the same, of a first cache
constexpr int64_t kParts = 16;            // sums of a gradient that are added up at the end
constexpr int64_t kMostSums = 1 << 22;    // of all parts, where there is more than one
constexpr int64_t kLargest = 1ll << 31;  // floats that offsets reach

// Whether 32 vectors of 16 floats fit the registers.
bool Has32Vectors() {
#ifdef WIDEST
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports(WIDEST) != 0);
  return has;
#else
  return false;
#endif
}

// --- Where taps of a window find their inputs ---

// A tap of a window along one axis: which outputs it adds to, and where it finds their inputs.
struct Tap {
  int64_t outputs;  // remainder of the outputs by the gaps
  int64_t inputs;   // which of the remainders of inputs by the stride
  int64_t shift;    // from the n-th of those outputs to the input
};

// One axis: output o of tap k is input (o * stride + k * spread - pad) / gap, where that is whole.
// One of stride and gap is 1.
struct Axis {
  int64_t in, out, stride, gap, margin, span, steps;
  std::vector<Tap> taps;
  std::vector<int64_t> remainders;  // of inputs by the stride, those that are read

  Axis(int64_t in, int64_t out, int64_t window, int64_t stride, int64_t gap, int64_t spread,
       int64_t pad, bool is_flipped)
      : in(in), out(out), stride(stride), gap(gap), span(0), steps((out + gap - 1) / gap) {
    margin = pad >= 0 ? (pad + gap - 1) / gap : -(-pad / gap);
    for (int64_t k = 0; k < window; ++k) {
      const int64_t at = (is_flipped ? window - 1 - k : k) * spread;
      Tap tap{0, 0, 0};
      if (gap > 1) {
        tap.outputs = ((pad - at) % gap + gap) % gap;
        tap.shift = (tap.outputs + at - pad) / gap + margin;
      } else {
        const auto found = std::find(remainders.begin(), remainders.end(), at % stride);
        tap.inputs = found - remainders.begin();
        if (found == remainders.end()) remainders.push_back(at % stride);
        tap.shift = at / stride;
      }
      span = std::max(span, tap.shift);
      taps.push_back(tap);
    }
    if (gap > 1) remainders = {0};
  }
};

enum { kWindow, kStride = 2, kGap = 4, kSpread = 6, kPad = 8, kGroups = 10, kPerGroup, kNumbers };

struct Geometry {
  int64_t images, inputs, outputs;  // channels
  int64_t groups, per_group;        // channels of the kernel's inputs
  bool is_transposed;
  Axis rows, columns;

  Geometry(Numbers n, bool is_transposed, const Images& x, const Images& y)
      : Geometry(n, is_transposed, x.dimensions(), y.dimensions()) {}

  int64_t Phases() const { return rows.gap * columns.gap; }

 private:
  using Sizes = ffi::Span<const int64_t>;
  Geometry(Numbers n, bool is_transposed, Sizes x, Sizes y)
      : images(x[0]), inputs(x[3]), outputs(y[3]), groups(n[kGroups]), per_group(n[kPerGroup]),
        is_transposed(is_transposed), rows(Of(n, 0, is_transposed, x[1], y[1])),
        columns(Of(n, 1, is_transposed, x[2], y[2])) {}

  static Axis Of(Numbers n, int i, bool is_transposed, int64_t in, int64_t out) {
    const int64_t window = n[kWindow + i], stride = n[kStride + i], gap = n[kGap + i];
    const int64_t spread = n[kSpread + i], pad = n[kPad + i];
    if (is_transposed)
      return Axis(in, out, window, gap, stride, spread, (window - 1) * spread - pad, true);
    return Axis(in, out, window, stride, gap, spread, pad, false);
  }
};

const char* CheckNumbers(Numbers n, bool is_transposed, const Images& x, const Images& y) {
  if (n.size() != kNumbers) return "granet_jax: a convolution is told by 12 numbers";
  for (int i = 0; i < kPerGroup; ++i)
    if (i != kPad && i != kPad + 1 && n[i] < 1) return "granet_jax: a window without a size";
  for (int i = 0; i < 2; ++i)
    if (n[kStride + i] > 1 && n[kGap + i] > 1)
      return "granet_jax: a stride and gaps in one convolution";
  const int64_t in = (is_transposed ? y : x).dimensions()[3], groups = n[kGroups];
  if (in != groups * n[kPerGroup] || (is_transposed ? x : y).dimensions()[3] % groups)
    return "granet_jax: channels of other groups";
  if (x.dimensions()[0] != y.dimensions()[0])
    return "granet_jax: inputs and outputs of two batches";
  return nullptr;
}

const char* CheckLists(Numbers n, bool is_transposed, const Images& x, const Images& y,
                       const Int32s& ends, const Int32s& places, const Int32s& slots) {
  if (const char* wrong = CheckNumbers(n, is_transposed, x, y)) return wrong;
  const int64_t rows = n[kWindow] * n[kWindow + 1] * n[kPerGroup];
  const int64_t out = (is_transposed ? x : y).dimensions()[3];
  return CheckEnds(ends, places, slots, is_transposed ? out : rows, is_transposed ? rows : out);
}

// Calls f(tap, input channel, slot) for each weight of an output channel.
template <class F>
INLINE void EachWeight(const Geometry& g, const int32_t* ends, const int32_t* places,
                       const int32_t* slots, int64_t channel, const F& f) {
  const int64_t window = g.rows.taps.size() * g.columns.taps.size();
  if (!g.is_transposed) {
    const int64_t first = channel / (g.outputs / g.groups) * g.per_group;
    for (int64_t list = channel, end = Tiles(window * g.per_group) * g.outputs, tap = 0; list < end;
         list += g.outputs) {
      for (int32_t k = ends[list]; k < ends[list + 1]; ++k) {
        if (tap * g.per_group > places[k]) tap = 0;
        while ((tap + 1) * g.per_group <= places[k]) ++tap;
        f(tap, first + places[k] - tap * g.per_group, slots[k]);
      }
    }
    return;
  }
  const int64_t lists = window * g.per_group, own = g.inputs / g.groups;
  const int64_t first = channel / g.per_group * own;
  for (int64_t tap = 0; tap < window; ++tap) {
    for (int64_t tile = 0; tile < Tiles(g.inputs); ++tile) {
      const int64_t list = tile * lists + tap * g.per_group + channel % g.per_group;
      for (int32_t k = ends[list]; k < ends[list + 1]; ++k)
        if (g.groups == 1 || (places[k] >= first && places[k] < first + own))
          f(tap, places[k], slots[k]);
    }
  }
}

// --- How images lie in planes ---

// How images are cut into planes: one for each channel, with a part for each pair of remainders, in
// which `rows` x `width` places follow each other, and the images of a place.
struct Planes {
  int64_t lanes;  // images that lie together: 1, or whole vectors of them
  int64_t rows, width, channels;
  int64_t part, plane;  // floats of each

  Planes(int64_t lanes, int64_t rows, int64_t width, int64_t parts, int64_t channels)
      : lanes(lanes), rows(rows), width(width), channels(channels) {
    part = Ceil(rows * width * lanes, kLanes) * kLanes;
    // Vectors may reach beyond the last place; an odd number of lines spreads planes over a cache.
    plane = ((parts * part / kLanes + (lanes == 1)) | 1) * kLanes;
  }

  int64_t Size() const { return plane * channels; }
};

// Lane i of channel c: to[c * plane + i] = from[i * step + c].
INLINE void Gather(const float* from, int64_t step, int64_t lanes, int64_t channels, float* to,
                   int64_t plane) {
  int64_t c = 0;
  if (lanes == kLanes) {
    for (; c + kLanes <= channels; c += kLanes) {
      V16 block[16];
      for (int i = 0; i < 16; ++i) block[i] = Load<V16>(from + i * step + c);
      Transpose16(block);
      for (int i = 0; i < 16; ++i) Store(to + (c + i) * plane, block[i]);
    }
  }
  for (; c < channels; ++c)
    for (int64_t i = 0; i < lanes; ++i) to[c * plane + i] = from[i * step + c];
}

// The way back.
INLINE void Scatter(const float* from, int64_t plane, float* to, int64_t step, int64_t lanes,
                    int64_t channels) {
  int64_t c = 0;
  if (lanes == kLanes) {
    for (; c + kLanes <= channels; c += kLanes) {
      V16 block[16];
      for (int i = 0; i < 16; ++i) block[i] = Load<V16>(from + (c + i) * plane);
      Transpose16(block);
      for (int i = 0; i < 16; ++i) Store(to + i * step + c, block[i]);
    }
  }
  for (; c < channels; ++c)
    for (int64_t i = 0; i < lanes; ++i) to[i * step + c] = from[c * plane + i];
}

// The places of one axis of an array that lie at first, first + 1, ... of one remainder.
struct Range {
  int64_t begin, end;  // among those, which are inside
  int64_t start, step;  // of the array, of place 0
  Range(int64_t size, int64_t start, int64_t step, int64_t num) : start(start), step(step) {
    begin = std::min(num, start >= 0 ? 0 : Ceil(-start, step));
    end = std::max(begin, std::min(num, size > start ? Ceil(size - start, step) : 0));
  }
};

// Calls f(place, image, lanes) for each vector of a row: lanes are places of one image, or images of
// one place.
template <class F>
INLINE void EachVector(const Planes& p, const Range& columns, int64_t images, const F& f) {
  if (p.lanes == 1) {
    for (int64_t u = columns.begin; u < columns.end; u += kLanes)
      f(u, 0, std::min(kLanes, columns.end - u));
    return;
  }
  for (int64_t u = columns.begin; u < columns.end; ++u)
    for (int64_t i = 0; i < p.lanes; i += kLanes)
      f(u, i, std::max<int64_t>(0, std::min(kLanes, images - i)));
}

// `images` images x (height, width, all channels), of which `p.channels` from x on, as planes.
CLONES void ToPlanes(const float* x, int64_t images, int64_t height, int64_t width, int64_t all,
                     const Planes& p, const Range& rows, const Range& columns, float* out) {
  const int64_t step = p.lanes == 1 ? columns.step * all : height * width * all;
  auto zeros = [&](int64_t row, int64_t begin, int64_t end) {
    for (int64_t c = 0; begin < end && c < p.channels; ++c)
      std::fill(out + c * p.plane + (row * p.width + begin) * p.lanes,
                out + c * p.plane + (row * p.width + end) * p.lanes, 0.0f);
  };
  for (int64_t row = 0; row < p.rows; ++row) {
    if (row < rows.begin || row >= rows.end) {
      zeros(row, 0, p.width);
      continue;
    }
    const float* from = x + (rows.start + row * rows.step) * width * all;
    zeros(row, 0, columns.begin);
    zeros(row, columns.end, p.width);
    EachVector(p, columns, images, [&](int64_t place, int64_t lane, int64_t num) INLINED {
      float* to = out + (row * p.width + place) * p.lanes + lane;
      if (p.lanes != 1 && num < kLanes)
        for (int64_t c = 0; c < p.channels; ++c) Store(to + c * p.plane, V16{});
      Gather(from + (columns.start + place * columns.step) * all + lane * step, step, num,
             p.channels, to, p.plane);
    });
  }
  if (p.lanes == 1)  // what vectors may reach
    for (int64_t c = 0; c < p.channels; ++c)
      std::fill(out + c * p.plane + p.rows * p.width, out + c * p.plane + p.part + kLanes, 0.0f);
}

CLONES void FromPlanes(const float* in, const Planes& p, const Range& rows, const Range& columns,
                       float* y, int64_t images, int64_t height, int64_t width, int64_t all) {
  const int64_t step = p.lanes == 1 ? columns.step * all : height * width * all;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* to = y + (rows.start + row * rows.step) * width * all;
    EachVector(p, columns, images, [&](int64_t place, int64_t lane, int64_t num) INLINED {
      Scatter(in + (row * p.width + place) * p.lanes + lane, p.plane,
              to + (columns.start + place * columns.step) * all + lane * step, step, num,
              p.channels);
    });
  }
}

// How the work is cut: blocks of images, bands of rows of outputs.
struct Plan {
  int64_t lanes, blocks, band, bands;
  Planes x, y;

  Plan(const Geometry& g, int64_t threads, int64_t phases)
      : lanes(Lanes(g)), blocks(Ceil(g.images, lanes)),
        band(Band(g, lanes, blocks, threads)), bands(Ceil(g.rows.steps, band)),
        x(lanes, band + g.rows.span, g.columns.steps + g.columns.span,
          g.rows.remainders.size() * g.columns.remainders.size(), g.inputs),
        y(lanes, band, lanes == 1 ? x.width : g.columns.steps, phases, g.outputs) {}

  int64_t Images(const Geometry& g, int64_t block) const {
    return std::min(lanes, g.images - block * lanes);
  }
  int64_t Rows(const Geometry& g, int64_t t) const { return std::min(band, g.rows.steps - t); }

 private:
  // Where there are few places, more images make as many vectors as registers hold.
  static int64_t Lanes(const Geometry& g) {
    if (g.images < kFewImages) return 1;
    int64_t lanes = kLanes;
    const int64_t places = std::min<int64_t>(g.rows.steps, 4) * g.columns.steps;
    while (lanes < g.images && places * lanes < 8 * kLanes) lanes *= 2;
    return lanes;
  }

  static int64_t Band(const Geometry& g, int64_t lanes, int64_t blocks, int64_t threads) {
    const int64_t parts = g.rows.remainders.size() * g.columns.remainders.size();
    const int64_t x_row = (g.columns.steps + g.columns.span) * g.inputs * lanes * parts * 4;
    const int64_t y_row = g.columns.steps * g.outputs * lanes * g.Phases() * 4;
    const int64_t fits = std::max<int64_t>(1, (kFits - g.rows.span * x_row) / (x_row + y_row));
    const int64_t rows = std::max(fits, std::min<int64_t>(g.rows.steps, 2 * g.rows.span));
    const int64_t bands = std::max(Ceil(g.rows.steps, rows), Ceil(threads, blocks));
    return std::max(Ceil(g.rows.steps, bands), std::min<int64_t>(g.rows.steps, g.rows.span + 1));
  }
};

// All inputs of a band of rows, from output row t of each phase on, as planes.
void Inputs(const Geometry& g, const Plan& plan, const Images& x, int64_t block, int64_t t,
            float* out) {
  const int64_t size = g.rows.in * g.columns.in * g.inputs;
  for (size_t i = 0; i < g.rows.remainders.size(); ++i) {
    for (size_t j = 0; j < g.columns.remainders.size(); ++j) {
      const int64_t row = t * g.rows.stride + g.rows.remainders[i] - g.rows.margin;
      const int64_t column = g.columns.remainders[j] - g.columns.margin;
      ToPlanes(x.typed_data() + block * plan.lanes * size, plan.Images(g, block), g.rows.in,
               g.columns.in, g.inputs, plan.x, Range(g.rows.in, row, g.rows.stride, plan.x.rows),
               Range(g.columns.in, column, g.columns.stride, plan.x.width),
               out + (i * g.columns.remainders.size() + j) * plan.x.part);
    }
  }
}

// Some channels of the outputs of a band, from `first` on, where these have no phases.
void Outputs(const Geometry& g, const Plan& plan, const Images& y, int64_t block, int64_t t,
             int64_t first, const Planes& own, float* out) {
  const int64_t size = g.rows.out * g.columns.out * g.outputs;
  ToPlanes(y.typed_data() + block * plan.lanes * size + first, plan.Images(g, block), g.rows.out,
           g.columns.out, g.outputs, own, Range(g.rows.out, t, 1, own.rows),
           Range(g.columns.out, 0, 1, own.width), out);
}

// --- Weights of each output channel ---

// A weight, and how far from an output it finds its input. Where gradients are summed, its slot.
struct Entry {
  int32_t offset;
  union {
    float value;
    int32_t slot;
  };
};

// Entries by phase, tile of inputs and output channel, as many as `begins` tells.
struct Entries {
  int64_t tiles;
  Entry* entries;
  std::vector<int32_t> begins;
};

// How far from an output a tap finds its input, and to which of the outputs it adds.
struct Offset {
  int64_t floats, phase;
};

std::vector<Offset> Offsets(const Geometry& g, const Plan& plan) {
  std::vector<Offset> offsets;
  for (const Tap& a : g.rows.taps) {
    for (const Tap& b : g.columns.taps) {
      const int64_t part = a.inputs * g.columns.remainders.size() + b.inputs;
      offsets.push_back({part * plan.x.part + (a.shift * plan.x.width + b.shift) * plan.lanes,
                         a.outputs * g.columns.gap + b.outputs});
    }
  }
  return offsets;
}

// How many channels of inputs are gone through before the next: as many as fit a first cache, and
// enough for a dozen weights of each output, whose sums are read and written each time.
int64_t Tile(const Geometry& g, int64_t live) {
  const int64_t bytes = (g.rows.span + 1) * (8 + g.columns.span) * kLanes * sizeof(float);
  const int64_t each = std::max<int64_t>(1, live * g.groups / g.outputs);  // of all inputs
  const int64_t tile = std::max(kFitsFirst / bytes, 16 * g.inputs / each) + 1;
  return 3 * tile >= 2 * g.inputs ? g.inputs : tile;
}

template <class F>
Entries MakeEntries(ffi::ThreadPool& pool, const Geometry& g, const Plan& plan, const Int32s& ends,
                    const Int32s& places, const Int32s& slots, const F& make) {
  const int64_t tile = Tile(g, ends.typed_data()[ends.dimensions()[0] - 1]);
  const int64_t tiles = Ceil(g.inputs, tile);
  std::vector<int32_t> tile_of(g.inputs);
  for (int64_t i = 0; i < g.inputs; ++i) tile_of[i] = i / tile * g.outputs;
  const std::vector<Offset> offsets = Offsets(g, plan);
  std::vector<int32_t> next(g.Phases() * tiles * g.outputs + 1, 0);
  const int64_t chunk = 16, chunks = Ceil(g.outputs, chunk);
  auto each = [&](int64_t i, auto f) {
    for (int64_t c = i * chunk; c < std::min(g.outputs, (i + 1) * chunk); ++c)
      EachWeight(g, ends.typed_data(), places.typed_data(), slots.typed_data(), c,
                 [&](int64_t tap, int64_t in, int32_t slot) {
                   f(next[offsets[tap].phase * tiles * g.outputs + tile_of[in] + c],
                     offsets[tap].floats + in * plan.x.plane, slot);
                 });
  };
  Parallel(pool, chunks, [&](int64_t i) {
    each(i, [](int32_t& num, int64_t, int32_t) { ++num; });
  });
  std::exclusive_scan(next.begin(), next.end(), next.begin(), 0);
  Entries made{tiles, Scratch<Entry, 10>(next.back()), next};
  Parallel(pool, chunks, [&](int64_t i) {
    each(i, [&](int32_t& num, int64_t offset, int32_t slot) {
      made.entries[num++] = make(static_cast<int32_t>(offset), slot);
    });
  });
  return made;
}

// --- Sums ---

// What is worked on at once: some vectors of some rows, for all output channels of a chunk.
struct Piece {
  const float* x;
  int64_t x_row;  // floats from row to row
  float* y;
  int64_t y_row, y_plane;
  const Entry* entries;
  const int32_t* begins;  // of the chunk's channels in the first tile
  int64_t channels, tiles, all;  // of the chunk; of inputs; channels of a tile
  float* sums;  // of entries
};

// Calls f(channel, begin, end, whether these are not the first) for the entries of each channel.
template <class F>
INLINE void EachList(const Piece& p, const F& f) {
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int32_t* begins = p.begins + tile * p.all;
    for (int64_t c = 0; c < p.channels; ++c) f(c, begins[c], begins[c + 1], tile > 0);
  }
}

template <int kRows, int kVectors>
INLINE void MultiplyPiece(const Piece& p) {
  EachList(p, [&](int64_t c, int32_t begin, int32_t end, bool goes_on) INLINED {
    float* out = p.y + c * p.y_plane;
    V16 sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = goes_on ? Load<V16>(out + r * p.y_row + v * kLanes) : V16{};
    for (const Entry *e = p.entries + begin, *last = p.entries + end; e < last; ++e) {
      const float* in = p.x + e->offset;
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] += e->value * Load<V16>(in + r * p.x_row + v * kLanes);
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) Store(out + r * p.y_row + v * kLanes, sum[r][v]);
  });
}

template <int kRows, int kVectors>
INLINE void SamplePiece(const Piece& p) {
  EachList(p, [&](int64_t c, int32_t k, int32_t last, bool) INLINED {
    V16 out[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        out[r][v] = Load<V16>(p.y + c * p.y_plane + r * p.y_row + v * kLanes);
    auto product = [&](int32_t k) INLINED {
      const float* in = p.x + p.entries[k].offset;
      V16 sum = out[0][0] * Load<V16>(in);
      for (int r = 0; r < kRows; ++r)
        for (int v = r == 0; v < kVectors; ++v)
          sum += out[r][v] * Load<V16>(in + r * p.x_row + v * kLanes);
      return sum;
    };
    for (; k + 4 <= last; k += 4) {
      const V4 four = SumsOf4(product(k), product(k + 1), product(k + 2), product(k + 3));
      Store(p.sums + k, Load<V4>(p.sums + k) + four);
    }
    for (; k < last; ++k) {
      const V4 one = Fold(product(k));
      p.sums[k] += (one[0] + one[2]) + (one[1] + one[3]);
    }
  });
}

#define PIECE(R, V)                                                       \
  CLONES void Multiply##R##x##V(const Piece& p) { MultiplyPiece<R, V>(p); } \
  CLONES void Sample##R##x##V(const Piece& p) { SamplePiece<R, V>(p); }
PIECE(1, 1) PIECE(1, 2) PIECE(1, 3) PIECE(1, 4) PIECE(1, 5) PIECE(1, 6) PIECE(1, 7) PIECE(1, 8)
PIECE(2, 1) PIECE(2, 2) PIECE(2, 3) PIECE(2, 4) PIECE(4, 1) PIECE(4, 2)
#undef PIECE

using Work = void (*)(const Piece&);
constexpr Work kMultiply[3][8] = {
    {Multiply1x1, Multiply1x2, Multiply1x3, Multiply1x4, Multiply1x5, Multiply1x6, Multiply1x7,
     Multiply1x8},
    {Multiply2x1, Multiply2x2, Multiply2x3, Multiply2x4},
    {Multiply4x1, Multiply4x2}};
constexpr Work kSample[3][8] = {
    {Sample1x1, Sample1x2, Sample1x3, Sample1x4, Sample1x5, Sample1x6, Sample1x7, Sample1x8},
    {Sample2x1, Sample2x2, Sample2x3, Sample2x4},
    {Sample4x1, Sample4x2}};

// A block of the gradient of all weights: kSide inputs and as many outputs, of one tap. The inputs
// of its places lie in `rows` rows of `columns` vectors.
template <int kSide>
INLINE void SampleBlock(const float* x, int64_t x_plane, int64_t x_row, const float* y,
                        int64_t y_plane, int64_t y_row, int64_t rows, int64_t columns, float* sums,
                        int64_t stride) {
  V16 sum[kSide][kSide];
  for (int i = 0; i < kSide; ++i)
    for (int o = 0; o < kSide; ++o) sum[i][o] = V16{};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t u = 0; u < columns; ++u) {
      V16 out[kSide];
      for (int o = 0; o < kSide; ++o)
        out[o] = Load<V16>(y + o * y_plane + row * y_row + u * kLanes);
      for (int i = 0; i < kSide; ++i) {
        const V16 in = Load<V16>(x + i * x_plane + row * x_row + u * kLanes);
        for (int o = 0; o < kSide; ++o) sum[i][o] += in * out[o];
      }
    }
  }
  for (int i = 0; i < kSide; ++i) {
    for (int o = 0; o < kSide; o += 4) {
      float* to = sums + i * stride + o;
      const V16 *a = sum[i] + o, none = V16{};
      const V4 four = SumsOf4(a[0], a[1], kSide > 2 ? a[2] : none, kSide > 2 ? a[3] : none);
      if (kSide > 2) {
        Store(to, Load<V4>(to) + four);
      } else {
        to[0] += four[0];
        to[1] += four[1];
      }
    }
  }
}

using Block = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                       int64_t, float*, int64_t);
CLONES void SampleBlock4(const float* x, int64_t x_plane, int64_t x_row, const float* y,
                         int64_t y_plane, int64_t y_row, int64_t rows, int64_t columns, float* sums,
                         int64_t stride) {
  SampleBlock<4>(x, x_plane, x_row, y, y_plane, y_row, rows, columns, sums, stride);
}
CLONES void SampleBlock2(const float* x, int64_t x_plane, int64_t x_row, const float* y,
                         int64_t y_plane, int64_t y_row, int64_t rows, int64_t columns, float* sums,
                         int64_t stride) {
  SampleBlock<2>(x, x_plane, x_row, y, y_plane, y_row, rows, columns, sums, stride);
}

// Goes through the places of a band, as many at once as registers hold; the same places together
// whatever the threads.
void ThroughPlaces(const Work (&work)[3][8], const Plan& plan, int64_t rows, int64_t steps,
                   Piece piece) {
  int64_t columns = steps * plan.lanes / kLanes;
  if (plan.lanes == 1) {  // rows are one long row
    columns = Ceil((rows - 1) * plan.x.width + steps, kLanes);
    rows = 1;
  }
  const int64_t most = Has32Vectors() ? 8 : 4;
  const int64_t num = Ceil(columns, Ceil(columns, most));
  const float* x = piece.x;
  float* y = piece.y;
  for (int64_t row = 0; row < rows;) {
    int log = 0;
    while (log < 2 && num << (log + 1) <= most && row + (2 << log) <= rows) ++log;
    for (int64_t column = 0; column < columns; column += num) {
      piece.x = x + row * piece.x_row + column * kLanes;
      piece.y = y + row * piece.y_row + column * kLanes;
      work[log][std::min(num, columns - column) - 1](piece);
    }
    row += 1 << log;
  }
}

// --- Calls ---

constexpr char kTooLarge[] = "granet_jax: images too large for the kernels of convolutions";

bool AnyOutside(ffi::ThreadPool& pool, const Int32s& ends, const Int32s& places,
                const Int32s& slots, int64_t inputs, int64_t capacity) {
  const int64_t live = ends.typed_data()[ends.dimensions()[0] - 1], part = 1 << 16;
  std::atomic<bool> outside{false};
  Parallel(pool, Ceil(live, part), [&](int64_t i) {
    if (AreOutside(places, slots, i * part, std::min(live, (i + 1) * part), inputs, capacity))
      outside = true;
  });
  return outside;
}

// Into how many sums the work of a gradient is cut, whatever the threads.
int64_t Parts(int64_t tasks, int64_t sums) {
  return std::max<int64_t>(1, std::min({tasks, kParts, kMostSums / std::max<int64_t>(1, sums)}));
}

bool IsEmpty(const Images& x) { return x.element_count() == 0; }

ffi::Error Convolve(ffi::ThreadPool pool, Images x, Floats values, Int32s ends, Int32s places,
                    Int32s slots, Numbers numbers, bool is_transposed, ffi::Result<Images> y) {
  if (const char* wrong = CheckLists(numbers, is_transposed, x, *y, ends, places, slots))
    return Invalid(wrong);
  if (IsEmpty(*y)) return ffi::Error::Success();
  if (IsEmpty(x)) {
    std::fill_n(y->typed_data(), y->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const Geometry g(numbers, is_transposed, x, *y);
  const int64_t window = g.rows.taps.size() * g.columns.taps.size();
  const int64_t inputs = is_transposed ? g.inputs : window * g.per_group;
  if (AnyOutside(pool, ends, places, slots, inputs, values.dimensions()[0]))
    return Invalid(kOutside);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const Plan plan(g, threads, g.Phases());
  if (plan.x.Size() >= kLargest || plan.y.Size() >= kLargest) return Invalid(kTooLarge);
  const float* value = values.typed_data();
  const Entries made =
      MakeEntries(pool, g, plan, ends, places, slots, [&](int32_t offset, int32_t slot) {
        Entry e{offset, {}};
        e.value = value[slot];
        return e;
      });
  const int64_t tasks = plan.blocks * plan.bands;
  const int64_t chunk = kLanes * Ceil(g.outputs, kLanes * Ceil(threads, tasks));
  const int64_t chunks = Ceil(g.outputs, chunk);
  Parallel(pool, tasks * chunks, [&](int64_t i) {
    const int64_t first = i % chunks * chunk, block = i / chunks / plan.bands;
    const int64_t t = i / chunks % plan.bands * plan.band, rows = plan.Rows(g, t);
    Planes own = plan.y;
    own.channels = std::min(chunk, g.outputs - first);
    float* in = Scratch<float, 11>(plan.x.Size());
    float* out = Scratch<float, 12>(own.Size());
    Inputs(g, plan, x, block, t, in);
    const int64_t row = plan.x.width * plan.lanes, size = g.rows.out * g.columns.out * g.outputs;
    for (int64_t phase = 0; phase < g.Phases(); ++phase) {
      float* part = out + phase * own.part;
      ThroughPlaces(kMultiply, plan, rows, g.columns.steps,
                    {in, row, part, own.width * own.lanes, own.plane, made.entries,
                     made.begins.data() + phase * made.tiles * g.outputs + first, own.channels,
                     made.tiles, g.outputs, nullptr});
      const int64_t start = t * g.rows.gap + phase / g.columns.gap;
      FromPlanes(part, own, Range(g.rows.out, start, g.rows.gap, rows),
                 Range(g.columns.out, phase % g.columns.gap, g.columns.gap, g.columns.steps),
                 y->typed_data() + block * plan.lanes * size + first, plan.Images(g, block),
                 g.rows.out, g.columns.out, g.outputs);
    }
  });
  return ffi::Error::Success();
}

ffi::Error SampleConvolution(ffi::ThreadPool pool, Images x, Images y, Int32s ends, Int32s places,
                             Int32s slots, Numbers numbers, bool is_transposed,
                             ffi::Result<Floats> of_slots) {
  if (const char* wrong = CheckLists(numbers, is_transposed, x, y, ends, places, slots))
    return Invalid(wrong);
  const int64_t capacity = of_slots->dimensions()[0];
  float* result = of_slots->typed_data();
  std::fill_n(result, capacity, 0.0f);
  if (IsEmpty(x) || IsEmpty(y)) return ffi::Error::Success();
  const Geometry g(numbers, is_transposed, x, y);
  if (g.Phases() > 1) return Invalid("granet_jax: a gradient of weights with gaps");
  const int64_t window = g.rows.taps.size() * g.columns.taps.size();
  const int64_t inputs = is_transposed ? g.inputs : window * g.per_group;
  if (AnyOutside(pool, ends, places, slots, inputs, capacity)) return Invalid(kOutside);
  const Plan plan(g, 1, 1);
  if (plan.x.Size() >= kLargest || plan.y.Size() >= kLargest) return Invalid(kTooLarge);
  const Entries made =
      MakeEntries(pool, g, plan, ends, places, slots, [](int32_t offset, int32_t slot) {
        Entry e{offset, {}};
        e.slot = slot;
        return e;
      });
  const int64_t live = made.begins.back(), tasks = plan.blocks * plan.bands;
  const int64_t parts = Parts(tasks, live);
  float* all = Scratch<float, 13>(parts * live);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = Ceil(g.outputs, Ceil(threads, parts)), chunks = Ceil(g.outputs, chunk);
  Parallel(pool, parts * chunks, [&](int64_t i) {
    const int64_t first = i % chunks * chunk, part = i / chunks;
    Planes own = plan.y;
    own.channels = std::min(chunk, g.outputs - first);
    float* in = Scratch<float, 11>(plan.x.Size());
    float* out = Scratch<float, 12>(own.Size());
    float* sums = all + part * live;
    const int32_t* begins = made.begins.data() + first;
    for (int64_t tile = 0; tile < made.tiles; ++tile)
      std::fill(sums + begins[tile * g.outputs], sums + begins[tile * g.outputs + own.channels],
                0.0f);
    for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task) {
      const int64_t block = task / plan.bands, t = task % plan.bands * plan.band;
      Inputs(g, plan, x, block, t, in);
      Outputs(g, plan, y, block, t, first, own, out);
      ThroughPlaces(kSample, plan, plan.Rows(g, t), g.columns.steps,
                    {in, plan.x.width * plan.lanes, out, own.width * own.lanes, own.plane,
                     made.entries, begins, own.channels, made.tiles, g.outputs, sums});
    }
  });
  const int64_t piece = 1 << 12;
  Parallel(pool, Ceil(live, piece), [&](int64_t i) {
    for (int64_t k = i * piece; k < std::min(live, (i + 1) * piece); ++k) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) sum += all[part * live + k];
      result[made.entries[k].slot] = sum;
    }
  });
  return ffi::Error::Success();
}

// The gradient of all weights, live or not.
ffi::Error SampleAll(ffi::ThreadPool pool, Images x, Images y, Numbers numbers,
                     ffi::Result<Images> of_weights) {
  if (const char* wrong = CheckNumbers(numbers, false, x, y)) return Invalid(wrong);
  float* result = of_weights->typed_data();
  const int64_t size = of_weights->element_count();
  if (numbers[kGroups] > 1 || numbers[kGap] > 1 || numbers[kGap + 1] > 1)
    return Invalid("granet_jax: a gradient of all weights with groups or gaps");
  std::fill_n(result, size, 0.0f);
  if (IsEmpty(x) || IsEmpty(y)) return ffi::Error::Success();
  const Geometry g(numbers, false, x, y);
  const int64_t window = g.rows.taps.size() * g.columns.taps.size();
  if (size != window * g.inputs * g.outputs) return Invalid("granet_jax: weights of another shape");
  const Plan plan(g, 1, 1);
  if (plan.x.Size() >= kLargest || plan.y.Size() >= kLargest) return Invalid(kTooLarge);
  const int64_t side = Has32Vectors() ? 4 : 2, all_inputs = Ceil(g.inputs, side) * side;
  const int64_t all_outputs = Ceil(g.outputs, side) * side, num = window * all_inputs * all_outputs;
  const int64_t tasks = plan.blocks * plan.bands, parts = Parts(tasks, num);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = Ceil(all_outputs / side, Ceil(threads, parts)) * side;
  const int64_t chunks = Ceil(g.outputs, chunk);
  const Block block_of = Has32Vectors() ? SampleBlock4 : SampleBlock2;
  float* all = Scratch<float, 13>(parts * num);
  const std::vector<Offset> offsets = Offsets(g, plan);
  Parallel(pool, parts * chunks, [&](int64_t i) {
    const int64_t first = i % chunks * chunk, part = i / chunks;
    Planes own = plan.y;
    own.channels = std::min(chunk, g.outputs - first);
    const int64_t outputs = std::min(chunk, all_outputs - first);
    float* in = Scratch<float, 11>(all_inputs * plan.x.plane);
    float* out = Scratch<float, 12>(outputs * own.plane);
    float* sums = all + part * num + first;
    for (int64_t k = 0; k < window * all_inputs; ++k)
      std::fill_n(sums + k * all_outputs, outputs, 0.0f);
    for (int64_t task = part * tasks / parts; task < (part + 1) * tasks / parts; ++task) {
      const int64_t block = task / plan.bands, t = task % plan.bands * plan.band;
      Inputs(g, plan, x, block, t, in);
      Outputs(g, plan, y, block, t, first, own, out);
      int64_t rows = plan.Rows(g, t), columns = g.columns.steps * plan.lanes / kLanes;
      if (plan.lanes == 1) {
        columns = Ceil((rows - 1) * plan.x.width + g.columns.steps, kLanes);
        rows = 1;
      }
      for (int64_t c = 0; c < all_inputs; c += side)
        for (int64_t tap = 0; tap < window; ++tap)
          for (int64_t o = 0; o < outputs; o += side)
            block_of(in + c * plan.x.plane + offsets[tap].floats, plan.x.plane,
                     plan.x.width * plan.lanes, out + o * own.plane, own.plane,
                     own.width * own.lanes, rows, columns,
                     sums + (tap * all_inputs + c) * all_outputs + o, all_outputs);
    }
  });
  Parallel(pool, window, [&](int64_t tap) {
    for (int64_t c = 0; c < g.inputs; ++c) {
      float* to = result + (tap * g.inputs + c) * g.outputs;
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = all + part * num + (tap * all_inputs + c) * all_outputs;
        for (int64_t o = 0; o < g.outputs; ++o) to[o] += from[o];
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_convolve, Convolve,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Images>()
        .Arg<Floats>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Attr<Numbers>("numbers")
        .Attr<bool>("is_transposed")
        .Ret<Images>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_sample_convolution, SampleConvolution,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Images>()
        .Arg<Images>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Arg<Int32s>()
        .Attr<Numbers>("numbers")
        .Attr<bool>("is_transposed")
        .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(granet_jax_sample_all, SampleAll,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<Images>()
        .Arg<Images>()
        .Attr<Numbers>("numbers")
        .Ret<Images>());
