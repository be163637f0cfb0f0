// Convolutions of many images with sparse kernels on a CPU.
//
// Images [N, H, W, C] are packed as tiles [tile][row][column][channel][width] of
// `width` images side by side, with a margin of zeros. Then every term of a
// result, the value of a connection times a pixel, is a vector at an address of
// its own, and the terms of neighbouring pixels lie `stride` vectors further: a
// connection's value is read once for several pixels. The gradient of a value
// is a sum of products of such vectors. pixels.cc is for few images.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common.h"
#include "tiles.h"
#include "window.h"

namespace powerprop {
namespace {

// The most images of a tile, and pixels that are computed together.
constexpr int kWidest = 16;
constexpr int kPixels = 8;

// Packed images: a margin, and how much lies before a pixel.
struct Packed {
  const float* data;
  int64_t rows, columns, channels;

  Packed(const Floats& packed)
      : data(packed.typed_data()),
        rows(packed.dimensions()[0]),
        columns(packed.dimensions()[1]),
        channels(packed.dimensions()[2]) {}

  // Floats before a place, for each image.
  int64_t Place(int64_t row, int64_t column) const {
    return (row * columns + column) * channels;
  }
  const float* Begin(const Tile& tile) const {
    return data + tile.start * rows * columns * channels;
  }
};

// Sums of terms: where in packed images each of them begins, per image.
struct Terms {
  std::vector<int64_t> starts;
  std::vector<int32_t> offsets;
};

// The connections to each channel that a convolution makes.
Terms TermsOfOutputs(const Window& window, const Packed& x, int64_t num_out,
                     const int32_t* offsets, const int32_t* positions) {
  std::vector<int32_t> entries;
  for (int64_t i = 0; i < window.kernel_height; ++i) {
    for (int64_t j = 0; j < window.kernel_width; ++j) {
      for (int64_t c = 0; c < x.channels; ++c) {
        entries.push_back(static_cast<int32_t>(x.Place(i, j) + c));
      }
    }
  }
  const int64_t num_entries = entries.size();
  Terms terms;
  terms.starts.assign(offsets, offsets + num_out + 1);
  terms.offsets.resize(offsets[num_out]);
  for (int64_t o = 0; o < num_out; ++o) {
    for (int64_t e = offsets[o]; e < offsets[o + 1]; ++e) {
      terms.offsets[e] = entries[positions[e] - o * num_entries];
    }
  }
  return terms;
}

// The connections from each input channel, of the places of an image that lie
// `phase_h` and `phase_w` behind a step of the window, and their values.
Terms TermsOfInputs(const Window& window, const Packed& dy, int64_t num_in,
                    int64_t phase_h, int64_t phase_w,
                    const int32_t* in_offsets, const int32_t* in_positions,
                    const int32_t* order, const float* values,
                    std::vector<float>* sorted) {
  const int64_t stride = window.stride;
  Terms terms;
  terms.starts.push_back(0);
  for (int64_t c = 0; c < num_in; ++c) {
    for (int64_t i = phase_h; i < window.kernel_height; i += stride) {
      for (int64_t j = phase_w; j < window.kernel_width; j += stride) {
        const int64_t entry = (i * window.kernel_width + j) * num_in + c;
        const int64_t back = dy.Place(i / stride, j / stride);
        for (int64_t e = in_offsets[entry]; e < in_offsets[entry + 1]; ++e) {
          const int64_t o = in_positions[e] - entry * dy.channels;
          sorted->push_back(values[order[e]]);
          terms.offsets.push_back(static_cast<int32_t>(o - back));
        }
      }
    }
    terms.starts.push_back(terms.offsets.size());
  }
  return terms;
}

// Calls a template with 8, 4, 2 or 1 pixels until `count` are done.
template <typename Call>
void ForPixels(int64_t count, const Call& call) {
  int64_t first = 0;
  for (; first + 8 <= count; first += 8) {
    call(first, std::integral_constant<int, 8>());
  }
  for (; first + 4 <= count; first += 4) {
    call(first, std::integral_constant<int, 4>());
  }
  for (; first + 2 <= count; first += 2) {
    call(first, std::integral_constant<int, 2>());
  }
  if (first < count) call(first, std::integral_constant<int, 1>());
}

// A row of pixels of a result, for the images of a tile.
struct Row {
  float* first;  // Of the first image.
  int64_t num_pixels, num_channels;
  int64_t pixel_stride, image_stride;
};

template <int kWidth>
void AddTerms(const Terms& terms, const float* values, const float* from,
              int64_t step, int64_t num_images, const Row& to) {
  using Vector = typename Lanes<kWidth>::Type;
  const int64_t channels = to.num_channels;
  float* sums = Scratch(3, kPixels * channels * kWidth);
  ForPixels(to.num_pixels, [&](int64_t first, auto pixels) {
    const float* place = from + first * step;
    for (int64_t c = 0; c < channels; ++c) {
      Vector v[pixels] = {};
      const int64_t last = terms.starts[c + 1];
      for (int64_t e = terms.starts[c]; e < last; ++e) {
        const float value = values[e];
        const float* x = place + int64_t{terms.offsets[e]} * kWidth;
        for (int k = 0; k < pixels; ++k) {
          v[k] += value * *reinterpret_cast<const Vector*>(x + k * step);
        }
      }
      for (int k = 0; k < pixels; ++k) {
        std::memcpy(sums + (k * channels + c) * kWidth, &v[k], sizeof(Vector));
      }
    }
    for (int k = 0; k < pixels; ++k) {
      float* pixel = to.first + (first + k) * to.pixel_stride;
      for (int64_t c = 0; c < channels; c += kBlock) {
        Turn(sums + (k * channels + c) * kWidth, kWidth,
             std::min(kBlock, channels - c), num_images, pixel + c,
             to.image_stride);
      }
    }
  });
}

// The products of one row of pixels for some rows of terms: sums[e - first] +=
// x . y, image by image.
template <int kWidth>
void AddProducts(const Terms& terms, int64_t begin, int64_t end,
                 const float* from_x, int64_t step_x, const float* from_y,
                 int64_t step_y, int64_t num_pixels,
                 typename Lanes<kWidth>::Type* sums) {
  using Vector = typename Lanes<kWidth>::Type;
  Vector* sums_of_none = sums - terms.starts[begin];
  for (int64_t o = begin; o < end; ++o) {
    ForPixels(num_pixels, [&](int64_t first, auto pixels) {
      Vector y[pixels];
      const float* place_y = from_y + first * step_y + o * kWidth;
      for (int k = 0; k < pixels; ++k) {
        std::memcpy(&y[k], place_y + k * step_y, sizeof(Vector));
      }
      const float* place_x = from_x + first * step_x;
      for (int64_t e = terms.starts[o]; e < terms.starts[o + 1]; ++e) {
        const float* x = place_x + int64_t{terms.offsets[e]} * kWidth;
        Vector sum = sums_of_none[e];
        for (int k = 0; k < pixels; ++k) {
          sum += y[k] * *reinterpret_cast<const Vector*>(x + k * step_x);
        }
        sums_of_none[e] = sum;
      }
    });
  }
}

// x [N, H, W, C] -> packed [rows, columns, C, N rounded up], pixel (0, 0) at
// (top, left), what does not fit left out.
ffi::Error PackImpl(Threads pool, Floats x, FloatResult packed,
                    Window window) {
  const int64_t height = x.dimensions()[1], width = x.dimensions()[2];
  const int64_t channels = x.dimensions()[3];
  const int64_t rows = packed->dimensions()[0];
  const int64_t columns = packed->dimensions()[1];
  const std::vector<Tile> tiles = MakeTiles(x.dimensions()[0], kWidest);
  const float* images = x.typed_data();
  const int64_t image_stride = height * width * channels;
  const int64_t first = std::clamp<int64_t>(-window.left, 0, width);
  const int64_t last = std::clamp<int64_t>(columns - window.left, first, width);
  const int64_t used = (last - first) * channels;
  const int64_t threads = NumThreads(pool, packed->element_count());
  RunInParallel(pool, threads, tiles.size() * rows, [&](int64_t task) {
    const Tile& tile = tiles[task / rows];
    const int64_t row = task % rows, h = row - window.top;
    float* to = packed->typed_data() +
                (tile.start * rows + row * tile.width) * columns * channels;
    float* end = to + columns * channels * tile.width;
    if (h < 0 || h >= height || used == 0) {
      std::fill(to, end, 0.0f);
      return;
    }
    float* begin = to + (first + window.left) * channels * tile.width;
    std::fill(to, begin, 0.0f);
    std::fill(begin + used * tile.width, end, 0.0f);
    if (tile.used < tile.width) std::fill(begin, begin + used * tile.width, 0.f);
    const float* from = images + tile.first * image_stride +
                        (h * width + first) * channels;
    for (int64_t c = 0; c < used; c += kBlock) {
      Turn(from + c, image_stride, tile.used, std::min(kBlock, used - c),
           begin + c * tile.width, tile.width);
    }
  });
  return ffi::Error::Success();
}

ffi::Error ConvolveImpl(Threads pool, Ints offsets, Ints positions,
                        Floats values, Floats packed, FloatResult y,
                        Window window) {
  const Packed x(packed);
  const auto shape = y->dimensions();
  const int64_t height = shape[1], width = shape[2], channels = shape[3];
  const Terms terms = TermsOfOutputs(window, x, channels, offsets.typed_data(),
                                     positions.typed_data());
  const std::vector<Tile> tiles = MakeTiles(shape[0], kWidest);
  const int64_t image_stride = height * width * channels;
  const int64_t threads =
      NumThreads(pool, height * width * shape[0] * terms.offsets.size());
  RunInParallel(pool, threads, tiles.size() * height, [&](int64_t task) {
    const Tile& tile = tiles[task / height];
    const int64_t h = task % height;
    const Row to = {y->typed_data() + tile.first * image_stride +
                        h * width * channels,
                    width, channels, channels, image_stride};
    ForWidth<kWidest>(tile.width, [&](auto lanes) {
      AddTerms<lanes>(terms, values.typed_data(),
                      x.Begin(tile) + x.Place(h * window.stride, 0) * lanes,
                      x.Place(0, window.stride) * lanes, tile.used, to);
    });
  });
  return ffi::Error::Success();
}

// How far back a window reaches, in steps of its own.
int64_t Reach(int64_t size, int64_t stride) { return (size - 1) / stride; }

ffi::Error ToInputImpl(Threads pool, Ints in_offsets, Ints in_positions,
                       Floats values, Ints order, Floats packed,
                       FloatResult dx, Window window) {
  const Packed dy(packed);
  // Nothing else may reach what is cut off.
  if (window.top < 0 || window.left < 0) {
    std::memset(dx->typed_data(), 0, dx->size_bytes());
  }
  const auto shape = dx->dimensions();
  const int64_t height = shape[1], width = shape[2], channels = shape[3];
  const int64_t stride = window.stride;
  const int64_t reach_h = Reach(window.kernel_height, stride);
  const int64_t reach_w = Reach(window.kernel_width, stride);
  const std::vector<Tile> tiles = MakeTiles(shape[0], kWidest);
  const int64_t image_stride = height * width * channels;
  // The first step at or behind a place, and how many there are on an image.
  const auto first_step = [&](int64_t before, int64_t phase) {
    return before > phase ? (before - phase + stride - 1) / stride : 0;
  };
  for (int64_t phase = 0; phase < stride * stride; ++phase) {
    const int64_t phase_h = phase / stride, phase_w = phase % stride;
    std::vector<float> sorted;
    const Terms terms = TermsOfInputs(
        window, dy, channels, phase_h, phase_w, in_offsets.typed_data(),
        in_positions.typed_data(), order.typed_data(), values.typed_data(),
        &sorted);
    const int64_t q = first_step(window.top, phase_h);
    const int64_t r = first_step(window.left, phase_w);
    const int64_t h = q * stride + phase_h - window.top;
    const int64_t w = r * stride + phase_w - window.left;
    const int64_t num_rows = h < height ? (height - h - 1) / stride + 1 : 0;
    const int64_t num_pixels = w < width ? (width - w - 1) / stride + 1 : 0;
    const int64_t threads = NumThreads(
        pool, num_rows * num_pixels * shape[0] *
                  (terms.offsets.size() + terms.starts.size()));
    RunInParallel(pool, threads, tiles.size() * num_rows, [&](int64_t task) {
      const Tile& tile = tiles[task / num_rows];
      const int64_t i = task % num_rows;
      const Row to = {dx->typed_data() + tile.first * image_stride +
                          ((h + i * stride) * width + w) * channels,
                      num_pixels, channels, stride * channels, image_stride};
      ForWidth<kWidest>(tile.width, [&](auto lanes) {
        AddTerms<lanes>(
            terms, sorted.data(),
            dy.Begin(tile) + dy.Place(q + i + reach_h, r + reach_w) * lanes,
            dy.channels * lanes, tile.used, to);
      });
    });
  }
  return ffi::Error::Success();
}

// Rows of terms, a block at a time: enough blocks for all threads, and sums that
// stay close.
std::vector<int64_t> SplitTerms(const Terms& terms, int64_t threads) {
  constexpr int64_t kClose = 2048;
  const int64_t total = terms.offsets.size();
  const int64_t blocks = std::max(2 * threads, total / kClose);
  const int64_t rows = terms.starts.size() - 1;
  std::vector<int64_t> bounds = {0};
  for (int64_t row = 1; row < rows; ++row) {
    if (terms.starts[row] * blocks >=
        total * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(row);
    }
  }
  bounds.push_back(rows);
  return bounds;
}

// to[e] += the sum of the vector of term e.
template <typename Vector>
void AddSums(Vector* sums, int64_t count, float* to) {
  int64_t e = 0;
  if constexpr (sizeof(Vector) == sizeof(Lanes<16>::Type)) {
    for (; e + 16 <= count; e += 16) {
      Vector before;
      std::memcpy(&before, to + e, sizeof(before));
      before += Sums(sums + e);
      std::memcpy(to + e, &before, sizeof(before));
    }
  }
  for (; e < count; ++e) to[e] += Sum(sums[e]);
}

ffi::Error ToValuesImpl(Threads pool, Ints offsets, Ints positions,
                        Floats packed_dy, Floats packed_x, FloatResult out,
                        Window window) {
  const Packed x(packed_x), dy(packed_dy);
  const int64_t reach_h = Reach(window.kernel_height, window.stride);
  const int64_t reach_w = Reach(window.kernel_width, window.stride);
  const Terms terms = TermsOfOutputs(window, x, dy.channels,
                                     offsets.typed_data(),
                                     positions.typed_data());
  const int64_t width = packed_x.dimensions()[3];
  const std::vector<Tile> tiles = MakeTiles(width, kWidest);
  const int64_t threads =
      NumThreads(pool, window.out_height * window.out_width * width *
                           terms.offsets.size());
  const std::vector<int64_t> bounds = SplitTerms(terms, threads);
  std::memset(out->typed_data(), 0, out->size_bytes());
  RunInParallel(pool, threads, bounds.size() - 1, [&](int64_t block) {
    const int64_t begin = bounds[block], end = bounds[block + 1];
    const int64_t count = terms.starts[end] - terms.starts[begin];
    for (const Tile& tile : tiles) {
      ForWidth<kWidest>(tile.width, [&](auto lanes) {
        using Vector = typename Lanes<lanes>::Type;
        float* sums = Scratch(3, std::max<int64_t>(count * lanes, 1));
        std::memset(sums, 0, count * sizeof(Vector));
        Vector* vectors = reinterpret_cast<Vector*>(sums);
        for (int64_t h = 0; h < window.out_height; ++h) {
          AddProducts<lanes>(
              terms, begin, end,
              x.Begin(tile) + x.Place(h * window.stride, 0) * lanes,
              x.Place(0, window.stride) * lanes,
              dy.Begin(tile) + dy.Place(h + reach_h, reach_w) * lanes,
              dy.channels * lanes, window.out_width, vectors);
        }
        AddSums(vectors, count, out->typed_data() + terms.starts[begin]);
      });
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace powerprop

XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropImagesPack, powerprop::PackImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropImagesConvolve, powerprop::ConvolveImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropImagesToInput, powerprop::ToInputImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropImagesToValues, powerprop::ToValuesImpl);
