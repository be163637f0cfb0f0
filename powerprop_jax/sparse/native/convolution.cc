// Convolutions with sparse kernels on a CPU, called from JAX programs.
//
// Images come as [N, H, W, C]. Each channel is first laid out as planes, in
// which the pixels under one entry of the kernel, for all places of the kernel,
// lie side by side: with a plane of Q columns, place (h, w) of entry (i, j) is
// h * Q + w further than entry (i, j) itself. With a stride s there is a plane
// for each of the s * s ways to be between places (phases). Then an output
// channel is a sum, over its connections, of a value times a run of floats, as
// in a matrix product; so is the gradient of the input, with planes of the
// output's gradient; and the gradient of a value is the dot product of two runs.
// Places of the kernel that hang over the right or lower edge of the plane are
// computed too, and dropped. Small images are laid out side by side, as groups.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace powerprop {

// How a kernel moves over an image; the rows above it and the columns to its
// left are padding.
struct Window {
  int64_t kernel_height, kernel_width, stride, top, left;
};

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
  int64_t images, height, width, channels;
  int64_t out_height, out_width, out_channels;
  // Rows and columns of a plane, and images side by side.
  int64_t rows, columns, group_size;

  int64_t num_phases() const { return stride * stride; }
  int64_t num_groups() const {
    return (images + group_size - 1) / group_size;
  }
  // Floats of a channel of a group.
  int64_t channel_size() const { return group_size * rows * columns; }
  // The furthest that an entry of the kernel lies from the first.
  int64_t reach() const {
    return (kernel_height - 1) / stride * columns +
           (kernel_width - 1) / stride;
  }
};

// Which pixel of an image [height, width] lies at each place of a plane; -1
// where there is none.
using PixelMap = std::vector<int32_t>;

PixelMap InputMap(const Geometry& g, int64_t phase) {
  PixelMap map(g.rows * g.columns, -1);
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t h = r * g.stride + phase / g.stride - g.top;
    for (int64_t q = 0; q < g.columns; ++q) {
      const int64_t w = q * g.stride + phase % g.stride - g.left;
      if (h >= 0 && h < g.height && w >= 0 && w < g.width) {
        map[r * g.columns + q] = static_cast<int32_t>(h * g.width + w);
      }
    }
  }
  return map;
}

PixelMap OutputMap(const Geometry& g) {
  PixelMap map(g.rows * g.columns, -1);
  for (int64_t h = 0; h < g.out_height; ++h) {
    for (int64_t w = 0; w < g.out_width; ++w) {
      map[h * g.columns + w] = static_cast<int32_t>(h * g.out_width + w);
    }
  }
  return map;
}

// Images as planes: [group][phase][channel][channel_size], with zeros before
// and after each group that runs may stray into.
struct Planes {
  float* data;
  int64_t group_stride;
  int64_t before;

  const float* Group(int64_t group) const {
    return data + group * group_stride + before;
  }
};

Planes Pack(ffi::ThreadPool& pool, int which, const Geometry& g,
            const float* images, int64_t pixels, int64_t channels,
            const std::vector<PixelMap>& maps) {
  const int64_t size = g.channel_size();
  const int64_t num_phases = maps.size();
  const int64_t before = g.reach();
  const int64_t used = num_phases * channels * size;
  const int64_t after = g.reach() + 2 * kRun;
  const int64_t stride = (before + used + after + kBlock - 1) / kBlock * kBlock;
  float* data = Scratch(which, stride * g.num_groups());
  const int64_t plane = g.rows * g.columns;
  // A group's images, one after the other, for each phase.
  const int64_t tasks_per_group = num_phases * g.group_size;
  const int64_t threads = NumThreads(pool, stride * g.num_groups());
  const int64_t tasks = g.num_groups() * tasks_per_group;
  RunInParallel(pool, threads, tasks, [&](int64_t task) {
    const int64_t group = task / tasks_per_group;
    const int64_t phase = task % tasks_per_group / g.group_size;
    const int64_t place = task % g.group_size;
    const int64_t image = group * g.group_size + place;
    float* begin = data + group * stride;
    if (task % tasks_per_group == 0) {
      std::memset(begin, 0, before * sizeof(float));
      std::memset(begin + before + used, 0,
                  (stride - before - used) * sizeof(float));
    }
    float* to = begin + before + phase * channels * size + place * plane;
    const PixelMap& map = maps[phase];
    float block[kBlock][kBlock];
    for (int64_t p = 0; p < plane; p += kBlock) {
      const int64_t num_places = std::min(kBlock, plane - p);
      for (int64_t c = 0; c < channels; c += kBlock) {
        const int64_t num_channels = std::min(kBlock, channels - c);
        for (int64_t i = 0; i < num_places; ++i) {
          if (image < g.images && map[p + i] >= 0) {
            std::memcpy(block[i],
                        images + (image * pixels + map[p + i]) * channels + c,
                        num_channels * sizeof(float));
          } else {
            std::memset(block[i], 0, sizeof(block[i]));
          }
        }
        Turn(block[0], kBlock, num_places, num_channels, to + c * size + p,
             size);
      }
    }
  });
  return {data, stride, before};
}

// Rows of connections: the runs that make up a channel of a result.
struct Rows {
  std::vector<int64_t> starts;
  // Where in a group of planes the run of a connection begins.
  std::vector<int32_t> offsets;
};

// Where the runs of kernel entry (i, j, c) begin, in planes of the input.
std::vector<int32_t> EntryOffsets(const Geometry& g) {
  std::vector<int32_t> found;
  const int64_t size = g.channel_size();
  for (int64_t i = 0; i < g.kernel_height; ++i) {
    for (int64_t j = 0; j < g.kernel_width; ++j) {
      const int64_t phase = i % g.stride * g.stride + j % g.stride;
      const int64_t shift = i / g.stride * g.columns + j / g.stride;
      for (int64_t c = 0; c < g.channels; ++c) {
        found.push_back(
            static_cast<int32_t>((phase * g.channels + c) * size + shift));
      }
    }
  }
  return found;
}

// The connections to each output channel.
Rows OutputRows(const Geometry& g, const int32_t* offsets,
                const int32_t* positions) {
  const std::vector<int32_t> entries = EntryOffsets(g);
  const int64_t num_entries = entries.size();
  Rows rows;
  rows.starts.assign(offsets, offsets + g.out_channels + 1);
  rows.offsets.resize(offsets[g.out_channels]);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    for (int64_t e = offsets[o]; e < offsets[o + 1]; ++e) {
      rows.offsets[e] = entries[positions[e] - o * num_entries];
    }
  }
  return rows;
}

// The connections from each input channel of each phase, and their values.
Rows InputRows(const Geometry& g, const int32_t* in_offsets,
               const int32_t* in_positions, const int32_t* order,
               const float* values, float* sorted) {
  const int64_t size = g.channel_size();
  Rows rows;
  rows.offsets.reserve(in_offsets[g.kernel_height * g.kernel_width *
                                  g.channels]);
  rows.starts.push_back(0);
  for (int64_t phase = 0; phase < g.num_phases(); ++phase) {
    for (int64_t c = 0; c < g.channels; ++c) {
      for (int64_t i = phase / g.stride; i < g.kernel_height; i += g.stride) {
        for (int64_t j = phase % g.stride; j < g.kernel_width; j += g.stride) {
          const int64_t entry = (i * g.kernel_width + j) * g.channels + c;
          const int64_t shift = i / g.stride * g.columns + j / g.stride;
          for (int64_t e = in_offsets[entry]; e < in_offsets[entry + 1]; ++e) {
            const int64_t o = in_positions[e] - entry * g.out_channels;
            sorted[rows.offsets.size()] = values[order[e]];
            rows.offsets.push_back(static_cast<int32_t>(o * size - shift));
          }
        }
      }
      rows.starts.push_back(rows.offsets.size());
    }
  }
  return rows;
}

// A block of channels of a result, for one group of images.
void AddRuns(const Geometry& g, const Rows& rows, const float* values,
             const float* planes, int64_t first_row, int64_t num_rows,
             int64_t group, const PixelMap& map, int64_t pixels,
             int64_t channels, int64_t first_channel, float* images) {
  const int64_t plane = g.rows * g.columns;
  alignas(64) float block[kBlock][kRun];
  for (int64_t p = 0; p < g.channel_size(); p += kRun) {
    for (int64_t i = 0; i < num_rows; ++i) {
      Vector sums[kVectors] = {};
      const int64_t last = rows.starts[first_row + i + 1];
      for (int64_t e = rows.starts[first_row + i]; e < last; ++e) {
        const float* run = planes + rows.offsets[e] + p;
        for (int64_t j = 0; j < kVectors; ++j) {
          sums[j] += values[e] * Load(run + j * kBlock);
        }
      }
      std::memcpy(block[i], sums, sizeof(sums));
    }
    const int64_t num_places = std::min(kRun, g.channel_size() - p);
    float turned[kRun][kBlock];
    for (int64_t b = 0; b < kRun; b += kBlock) {
      Turn(block[0] + b, kRun, num_rows, kBlock, turned[b], kBlock);
    }
    for (int64_t b = 0; b < num_places; ++b) {
      const int64_t image = group * g.group_size + (p + b) / plane;
      const int32_t pixel = map[(p + b) % plane];
      if (pixel < 0 || image >= g.images) continue;
      std::memcpy(images + (image * pixels + pixel) * channels + first_channel,
                  turned[b], num_rows * sizeof(float));
    }
  }
}

// Whole results from planes: `maps` says where each phase goes.
void Accumulate(ffi::ThreadPool& pool, const Geometry& g, const Rows& rows,
                const float* values, const Planes& planes,
                const std::vector<PixelMap>& maps, int64_t pixels,
                int64_t channels, float* images) {
  const int64_t blocks = (channels + kBlock - 1) / kBlock;
  const int64_t tasks_per_group = blocks * maps.size();
  const int64_t work = g.num_groups() * g.channel_size() *
                       (rows.offsets.size() + rows.starts.size());
  const int64_t threads = NumThreads(pool, work);
  const int64_t tasks = g.num_groups() * tasks_per_group;
  RunInParallel(pool, threads, tasks, [&](int64_t task) {
    const int64_t group = task / tasks_per_group;
    const int64_t phase = task % tasks_per_group / blocks;
    const int64_t channel = task % blocks * kBlock;
    AddRuns(g, rows, values, planes.Group(group), phase * channels + channel,
            std::min(kBlock, channels - channel), group, maps[phase], pixels,
            channels, channel, images);
  });
}

std::vector<PixelMap> InputMaps(const Geometry& g) {
  std::vector<PixelMap> maps;
  for (int64_t p = 0; p < g.num_phases(); ++p) maps.push_back(InputMap(g, p));
  return maps;
}

// x [N, H, W, C], y [N, H', W', D].
Geometry MakeGeometry(ffi::ThreadPool& pool, ffi::Span<const int64_t> x,
                      ffi::Span<const int64_t> y, const Window& window) {
  Geometry g = {window};
  g.images = x[0];
  g.height = x[1];
  g.width = x[2];
  g.channels = x[3];
  g.out_height = y[1];
  g.out_width = y[2];
  g.out_channels = y[3];
  g.rows = g.out_height + (g.kernel_height - 1) / g.stride;
  g.columns = g.out_width + (g.kernel_width - 1) / g.stride;
  // Enough floats for some runs, and enough groups for all threads.
  const int64_t plane = std::max<int64_t>(g.rows * g.columns, 1);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t most = std::max<int64_t>(g.images / (2 * threads), 1);
  g.group_size = std::min(most, (4 * kRun + plane - 1) / plane);
  return g;
}

ffi::Error ConvolveImpl(Threads pool, Ints offsets, Ints positions,
                        Floats values, Floats x, FloatResult y,
                        Window window) {
  if (y->element_count() == 0) return ffi::Error::Success();
  const Geometry g = MakeGeometry(pool, x.dimensions(), y->dimensions(),
                                  window);
  const Rows rows =
      OutputRows(g, offsets.typed_data(), positions.typed_data());
  const Planes planes = Pack(pool, 0, g, x.typed_data(), g.height * g.width,
                             g.channels, InputMaps(g));
  Accumulate(pool, g, rows, values.typed_data(), planes, {OutputMap(g)},
             g.out_height * g.out_width, g.out_channels, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error ToInputImpl(Threads pool, Ints in_offsets, Ints in_positions,
                       Floats values, Ints order, Floats dy, FloatResult dx,
                       Window window) {
  std::memset(dx->typed_data(), 0, dx->size_bytes());
  if (dy.element_count() == 0) return ffi::Error::Success();
  const Geometry g = MakeGeometry(pool, dx->dimensions(), dy.dimensions(),
                                  window);
  float* sorted = Scratch(2, std::max<int64_t>(values.element_count(), 1));
  const Rows rows =
      InputRows(g, in_offsets.typed_data(), in_positions.typed_data(),
                order.typed_data(), values.typed_data(), sorted);
  const Planes planes =
      Pack(pool, 1, g, dy.typed_data(), g.out_height * g.out_width,
           g.out_channels, {OutputMap(g)});
  Accumulate(pool, g, rows, sorted, planes, InputMaps(g), g.height * g.width,
             g.channels, dx->typed_data());
  return ffi::Error::Success();
}

ffi::Error ToValuesImpl(Threads pool, Ints offsets, Ints positions,
                        Floats dy, Floats x, FloatResult out,
                        Window window) {
  float* to = out->typed_data();
  std::memset(to, 0, out->size_bytes());
  if (dy.element_count() == 0 || out->element_count() == 0) {
    return ffi::Error::Success();
  }
  const Geometry g = MakeGeometry(pool, x.dimensions(), dy.dimensions(),
                                  window);
  const Rows rows =
      OutputRows(g, offsets.typed_data(), positions.typed_data());
  const Planes planes_x = Pack(pool, 0, g, x.typed_data(), g.height * g.width,
                               g.channels, InputMaps(g));
  const Planes planes_y =
      Pack(pool, 1, g, dy.typed_data(), g.out_height * g.out_width,
           g.out_channels, {OutputMap(g)});
  const int64_t size = g.channel_size();
  // Beyond the last place in a plane there are only zeros.
  const int64_t used = size - g.reach();
  const int64_t threads =
      NumThreads(pool, g.num_groups() * size * rows.offsets.size());
  RunInParallel(pool, threads, g.out_channels, [&](int64_t o) {
    for (int64_t group = 0; group < g.num_groups(); ++group) {
      const float* run_y = planes_y.Group(group) + o * size;
      for (int64_t e = rows.starts[o]; e < rows.starts[o + 1]; ++e) {
        const float* run_x = planes_x.Group(group) + rows.offsets[e];
        Vector sums[kVectors] = {};
        int64_t p = 0;
        for (; p + kRun <= used; p += kRun) {
          for (int64_t j = 0; j < kVectors; ++j) {
            sums[j] += Load(run_y + p + j * kBlock) *
                       Load(run_x + p + j * kBlock);
          }
        }
        float sum = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; p < used; ++p) sum += run_y[p] * run_x[p];
        to[e] += sum;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace powerprop

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    powerprop::Window, xla::ffi::StructMember<int64_t>("kernel_height"),
    xla::ffi::StructMember<int64_t>("kernel_width"),
    xla::ffi::StructMember<int64_t>("stride"),
    xla::ffi::StructMember<int64_t>("top"),
    xla::ffi::StructMember<int64_t>("left"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropConvolve, powerprop::ConvolveImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropConvolutionToInput,
                              powerprop::ToInputImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropConvolutionToValues,
                              powerprop::ToValuesImpl);
