// Convolutions of few images with sparse kernels on a CPU.
//
// Each channel of an image [H, W, C] is first laid out as a plane, in which the
// pixels under one entry of the kernel, for all places of the kernel, lie side
// by side: with a plane of Q columns, place (h, w) of entry (i, j) is h * Q + w
// further than entry (i, j) itself. With a stride s there is a plane for each of
// the s * s ways to be between places (phases). Then an output channel is a sum,
// over its connections, of a value times a run of floats. Places of the kernel
// that hang over the right edge of the plane are computed too, and dropped.
// images.cc is for many images.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"
#include "window.h"

namespace powerprop {
namespace {

// The floats of a run that are computed together.
constexpr int64_t kRun = 64;
using Vector = Lanes<kBlock>::Type;
constexpr int64_t kVectors = kRun / kBlock;

// A run need not begin at the start of a cache line.
inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

struct Geometry : Window {
  int64_t height, width, channels, out_channels;
  // Rows and columns of a plane.
  int64_t rows, columns;

  Geometry(const Window& window, ffi::Span<const int64_t> x,
           ffi::Span<const int64_t> y)
      : Window(window),
        height(x[1]),
        width(x[2]),
        channels(x[3]),
        out_channels(y[3]),
        rows(y[1] + (kernel_height - 1) / stride),
        columns(y[2] + (kernel_width - 1) / stride) {}

  int64_t num_phases() const { return stride * stride; }
  int64_t plane() const { return rows * columns; }
  // Floats of an image, with what runs may stray into.
  int64_t image() const {
    const int64_t used = num_phases() * channels * plane();
    return (used + 2 * kRun + kBlock - 1) / kBlock * kBlock;
  }
};

// Which pixel of an image lies at each place of a plane; -1 where none does.
std::vector<int64_t> PixelsOfPlane(const Geometry& g, int64_t phase) {
  std::vector<int64_t> pixels(g.plane(), -1);
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t h = r * g.stride + phase / g.stride - g.top;
    for (int64_t q = 0; q < g.columns; ++q) {
      const int64_t w = q * g.stride + phase % g.stride - g.left;
      if (h >= 0 && h < g.height && w >= 0 && w < g.width) {
        pixels[r * g.columns + q] = h * g.width + w;
      }
    }
  }
  return pixels;
}

// One phase of an image -> [channel][plane].
void PackPhase(const Geometry& g, const float* image, int64_t phase,
               float* planes) {
  const std::vector<int64_t> pixels = PixelsOfPlane(g, phase);
  const int64_t plane = g.plane();
  float block[kBlock][kBlock];
  for (int64_t p = 0; p < plane; p += kBlock) {
    const int64_t num_places = std::min(kBlock, plane - p);
    for (int64_t c = 0; c < g.channels; c += kBlock) {
      const int64_t num_channels = std::min(kBlock, g.channels - c);
      for (int64_t i = 0; i < num_places; ++i) {
        if (pixels[p + i] >= 0) {
          std::memcpy(block[i], image + pixels[p + i] * g.channels + c,
                      num_channels * sizeof(float));
        } else {
          std::memset(block[i], 0, sizeof(block[i]));
        }
      }
      Turn(block[0], kBlock, num_places, num_channels, planes + c * plane + p,
           plane);
    }
  }
}

// Where the run of each connection begins, in the planes of an image.
std::vector<int32_t> Runs(const Geometry& g, const int32_t* offsets,
                          const int32_t* positions) {
  std::vector<int32_t> entries;
  for (int64_t i = 0; i < g.kernel_height; ++i) {
    for (int64_t j = 0; j < g.kernel_width; ++j) {
      const int64_t phase = i % g.stride * g.stride + j % g.stride;
      const int64_t shift = i / g.stride * g.columns + j / g.stride;
      for (int64_t c = 0; c < g.channels; ++c) {
        entries.push_back(static_cast<int32_t>(
            (phase * g.channels + c) * g.plane() + shift));
      }
    }
  }
  const int64_t num_entries = entries.size();
  std::vector<int32_t> runs(offsets[g.out_channels]);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    for (int64_t e = offsets[o]; e < offsets[o + 1]; ++e) {
      runs[e] = entries[positions[e] - o * num_entries];
    }
  }
  return runs;
}

// Channels [first, first + num_channels) of a result [H', W', D].
void AddRuns(const Geometry& g, const int32_t* offsets, const int32_t* runs,
             const float* values, const float* planes, int64_t first,
             int64_t num_channels, float* y) {
  alignas(64) float block[kBlock][kRun];
  float turned[kRun][kBlock];
  const int64_t num_places = g.out_height * g.columns;
  for (int64_t p = 0; p < num_places; p += kRun) {
    for (int64_t i = 0; i < num_channels; ++i) {
      Vector sums[kVectors] = {};
      const int64_t last = offsets[first + i + 1];
      for (int64_t e = offsets[first + i]; e < last; ++e) {
        const float* run = planes + runs[e] + p;
        for (int64_t j = 0; j < kVectors; ++j) {
          sums[j] += values[e] * Load(run + j * kBlock);
        }
      }
      std::memcpy(block[i], sums, sizeof(sums));
    }
    for (int64_t b = 0; b < kRun; b += kBlock) {
      Turn(block[0] + b, kRun, num_channels, kBlock, turned[b], kBlock);
    }
    for (int64_t b = 0; b < std::min(kRun, num_places - p); ++b) {
      const int64_t h = (p + b) / g.columns, w = (p + b) % g.columns;
      if (w >= g.out_width) continue;
      std::memcpy(y + (h * g.out_width + w) * g.out_channels + first,
                  turned[b], num_channels * sizeof(float));
    }
  }
}

// x [N, H, W, C] -> y [N, H', W', D].
ffi::Error ConvolveImpl(Threads pool, Ints offsets, Ints positions,
                        Floats values, Floats x, FloatResult y,
                        Window window) {
  const Geometry g(window, x.dimensions(), y->dimensions());
  const int64_t images = x.dimensions()[0], phases = g.num_phases();
  const std::vector<int32_t> runs =
      Runs(g, offsets.typed_data(), positions.typed_data());
  float* planes = Scratch(0, images * g.image());
  RunInParallel(
      pool, NumThreads(pool, images * g.image()), images * phases,
      [&](int64_t task) {
        const int64_t n = task / phases, phase = task % phases;
        const int64_t used = phases * g.channels * g.plane();
        float* to = planes + n * g.image();
        if (phase == 0) std::fill(to + used, to + g.image(), 0.0f);
        PackPhase(g, x.typed_data() + n * g.height * g.width * g.channels,
                  phase, to + phase * g.channels * g.plane());
      });
  const int64_t blocks = (g.out_channels + kBlock - 1) / kBlock;
  const int64_t work = images * g.plane() * (runs.size() + g.out_channels);
  RunInParallel(
      pool, NumThreads(pool, work), images * blocks, [&](int64_t task) {
        const int64_t n = task / blocks, first = task % blocks * kBlock;
        AddRuns(g, offsets.typed_data(), runs.data(), values.typed_data(),
                planes + n * g.image(), first,
                std::min(kBlock, g.out_channels - first),
                y->typed_data() +
                    n * g.out_height * g.out_width * g.out_channels);
      });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace powerprop

XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropPixelsConvolve, powerprop::ConvolveImpl);
