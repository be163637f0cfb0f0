// Products with sparse matrices on a CPU, called from JAX programs.
//
// A matrix [rows, columns] is held row by row: offsets[r] to offsets[r + 1] are
// the entries of row r, and an entry's position is r * columns + column. Both
// products walk through the entries of a row and take, for each, a vector of
// `width` examples of one feature, which therefore must lie side by side: x
// [batch, columns] is first repacked as tiles [tile][column][width]. A tile of
// some thousand columns stays in the second-level cache of a core.
//
// Positions come from the caller and are used as they are: they must lie in
// their row, and offsets must ascend from 0 to at most the number of entries.
// There is at least one of everything: sparse/linear.py sees to that.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "common.h"
#include "tiles.h"

namespace powerprop {
namespace {

// The most examples of a tile.
constexpr int kWidest = 64;

// Columns [begin, end) of x [batch, columns] -> packed [column][width] of one
// tile.
void PackTile(const float* x, int64_t columns, const Tile& tile, int64_t begin,
              int64_t end, float* packed) {
  float block[kBlock][kBlock];
  for (int64_t b = 0; b < tile.width; b += kBlock) {
    const int64_t num_examples = std::min(kBlock, tile.width - b);
    const int64_t used = std::min(num_examples, tile.used - b);
    const float* rows = x + (tile.first + b) * columns;
    for (int64_t c = begin; c < end; c += kBlock) {
      const int64_t num_columns = std::min(kBlock, end - c);
      float* to = packed + c * tile.width + b;
      if (used == num_examples) {
        Turn(rows + c, columns, used, num_columns, to, tile.width);
        continue;
      }
      std::memset(block, 0, sizeof(block));
      for (int64_t i = 0; i < used; ++i) {
        std::memcpy(block[i], rows + i * columns + c,
                    num_columns * sizeof(float));
      }
      Turn(block[0], kBlock, num_examples, num_columns, to, tile.width);
    }
  }
}

void Pack(ffi::ThreadPool& pool, const float* x, int64_t columns,
          const std::vector<Tile>& tiles, float* packed) {
  constexpr int64_t kColumns = 512;
  const int64_t parts = (columns + kColumns - 1) / kColumns;
  const int64_t threads = NumThreads(pool, columns * PackedWidth(tiles));
  RunInParallel(pool, threads, parts * tiles.size(), [&](int64_t i) {
    const Tile& tile = tiles[i / parts];
    const int64_t begin = i % parts * kColumns;
    PackTile(x, columns, tile, begin, std::min(begin + kColumns, columns),
             packed + tile.start * columns);
  });
}

struct Matrix {
  int64_t rows;
  int64_t columns;
  const int32_t* offsets;
  const int32_t* positions;
};

// Blocks of rows with about as many entries each.
std::vector<int64_t> SplitRows(const Matrix& a, int64_t parts) {
  std::vector<int64_t> bounds = {0};
  // A row costs something even if it is empty.
  const int64_t total = a.offsets[a.rows] + 8 * a.rows;
  for (int64_t row = 0; row < a.rows; row += kBlock) {
    const int64_t done = a.offsets[row] + 8 * row;
    if (row > bounds.back() &&
        done * parts >= total * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(row);
    }
  }
  bounds.push_back(a.rows);
  return bounds;
}

// One tile of the product for some rows: y[b, r] = sum of values * x[b, c].
template <int kWidth>
void MultiplyRows(const Matrix& a, const float* values, const float* packed,
                  const Tile& tile, int64_t begin, int64_t end, float* y) {
  constexpr int kVectors = Examples<kWidth>::kVectors;
  using Vector = typename Examples<kWidth>::Vector;
  // Some cache lines of an example are written one after the other.
  constexpr int64_t kRows = 4 * kBlock;
  alignas(64) float block[kRows][kWidth];
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t num_rows = std::min(kRows, end - row);
    for (int64_t i = 0; i < num_rows; ++i) {
      const float* base = packed - (row + i) * a.columns * kWidth;
      Vector sums[kVectors] = {};
      const int64_t last = a.offsets[row + i + 1];
      for (int64_t e = a.offsets[row + i]; e < last; ++e) {
        const float value = values[e];
        const Vector* x = reinterpret_cast<const Vector*>(
            base + static_cast<int64_t>(a.positions[e]) * kWidth);
        for (int j = 0; j < kVectors; ++j) sums[j] += value * x[j];
      }
      std::memcpy(block[i], sums, sizeof(sums));
    }
    for (int64_t b = 0; b < tile.used; b += kBlock) {
      const int64_t num_examples = std::min(kBlock, tile.used - b);
      float* to = y + (tile.first + b) * a.rows + row;
      for (int64_t i = 0; i < num_rows; i += kBlock) {
        Turn(block[i] + b, kWidth, std::min(kBlock, num_rows - i), num_examples,
             to + i, a.rows);
      }
    }
  }
}

using Four = Lanes<4>::Type;
using Eight = Lanes<8>::Type;

// values[j] * base[positions[j]]. Eight loads, written down one by one, were
// faster than a gather instruction where they were measured (AMD EPYC, Zen 4
// and 5).
inline Eight GatheredProducts(const float* base, const int32_t* positions,
                              const float* values) {
  Eight v;
  std::memcpy(&v, values, sizeof(v));
  return v * Eight{base[positions[0]], base[positions[1]], base[positions[2]],
                   base[positions[3]], base[positions[4]], base[positions[5]],
                   base[positions[6]], base[positions[7]]};
}

// One example: there is nothing to lay side by side.
void MultiplyVector(const Matrix& a, const float* values, const float* x,
                    int64_t begin, int64_t end, float* y) {
  for (int64_t row = begin; row < end; ++row) {
    const float* base = x - row * a.columns;
    const int64_t last = a.offsets[row + 1];
    int64_t e = a.offsets[row];
    // Two sums: each addition waits for the one before.
    Eight even = {}, odd = {};
    for (; e + 16 <= last; e += 16) {
      even += GatheredProducts(base, a.positions + e, values + e);
      odd += GatheredProducts(base, a.positions + e + 8, values + e + 8);
    }
    if (e + 8 <= last) {
      even += GatheredProducts(base, a.positions + e, values + e);
      e += 8;
    }
    Four rest = {};
    if (e + 4 <= last) {
      const int32_t* p = a.positions + e;
      std::memcpy(&rest, values + e, sizeof(rest));
      rest *= Four{base[p[0]], base[p[1]], base[p[2]], base[p[3]]};
      e += 4;
    }
    float sum = Sum(even + odd) + Sum(rest);
    for (; e < last; ++e) sum += values[e] * base[a.positions[e]];
    y[row] = sum;
  }
}

// values[order[e]] for all entries e.
const float* Permute(ffi::ThreadPool& pool, const float* values,
                     const int32_t* order, int64_t size) {
  float* permuted = Scratch(1, size);
  constexpr int64_t kEntries = 16384;
  const int64_t threads = NumThreads(pool, size);
  const int64_t parts = (size + kEntries - 1) / kEntries;
  RunInParallel(pool, threads, parts, [&](int64_t i) {
    const int64_t end = std::min((i + 1) * kEntries, size);
    for (int64_t e = i * kEntries; e < end; ++e) permuted[e] = values[order[e]];
  });
  return permuted;
}

void Multiply(ffi::ThreadPool& pool, const Matrix& a, const float* values,
              const float* packed, int64_t batch, float* y) {
  const int64_t work = a.offsets[a.rows] * batch;
  if (batch == 1) {
    // These are gathered one by one, and take longer than others.
    const int64_t threads = NumThreads(pool, 3 * work);
    const std::vector<int64_t> bounds = SplitRows(a, threads);
    RunInParallel(pool, threads, bounds.size() - 1, [&](int64_t i) {
      MultiplyVector(a, values, packed, bounds[i], bounds[i + 1], y);
    });
    return;
  }
  const std::vector<Tile> tiles = MakeTiles(batch, kWidest);
  const int64_t threads = NumThreads(pool, work);
  const std::vector<int64_t> bounds = SplitRows(a, 2 * threads);
  const int64_t parts = bounds.size() - 1;
  RunInParallel(pool, threads, parts * tiles.size(), [&](int64_t i) {
    const Tile& tile = tiles[i / parts];
    const int64_t begin = bounds[i % parts], end = bounds[i % parts + 1];
    const float* from = packed + tile.start * a.columns;
    ForWidth<kWidest>(tile.width, [&](auto width) {
      MultiplyRows<width>(a, values, from, tile, begin, end, y);
    });
  });
}

// One tile of the products of rows: out[e] += y[:, row] . x[:, column].
template <int kWidth>
void DotRows(const Matrix& a, const float* packed_y, const float* packed_x,
             bool is_first, int64_t begin, int64_t end, float* out) {
  constexpr int kVectors = Examples<kWidth>::kVectors;
  using Vector = typename Examples<kWidth>::Vector;
  for (int64_t row = begin; row < end; ++row) {
    const float* base = packed_x - row * a.columns * kWidth;
    Vector y[kVectors];
    std::memcpy(y, packed_y + row * kWidth, sizeof(y));
    const auto products = [&](int64_t e) {
      const Vector* x = reinterpret_cast<const Vector*>(
          base + static_cast<int64_t>(a.positions[e]) * kWidth);
      Vector sums = y[0] * x[0];
      for (int j = 1; j < kVectors; ++j) sums += y[j] * x[j];
      return sums;
    };
    int64_t e = a.offsets[row];
    const int64_t last = a.offsets[row + 1];
    if constexpr (Examples<kWidth>::kLanes == 16) {
      for (; e + 16 <= last; e += 16) {
        Vector found[16];
        for (int j = 0; j < 16; ++j) found[j] = products(e + j);
        Vector sums = Sums(found);
        if (!is_first) {
          Vector before;
          std::memcpy(&before, out + e, sizeof(before));
          sums += before;
        }
        std::memcpy(out + e, &sums, sizeof(sums));
      }
    }
    for (; e < last; ++e) {
      const float sum = Sum(products(e));
      out[e] = is_first ? sum : out[e] + sum;
    }
  }
}

void Dot(ffi::ThreadPool& pool, const Matrix& a, const float* packed_y,
         const float* packed_x, int64_t batch, float* out) {
  if (batch == 1) {
    for (int64_t row = 0; row < a.rows; ++row) {
      const float* base = packed_x - row * a.columns;
      for (int64_t e = a.offsets[row]; e < a.offsets[row + 1]; ++e) {
        out[e] = packed_y[row] * base[a.positions[e]];
      }
    }
    return;
  }
  const std::vector<Tile> tiles = MakeTiles(batch, kWidest);
  const int64_t threads = NumThreads(pool, a.offsets[a.rows] * batch);
  // Not more parts: each of them looks at all of x.
  const std::vector<int64_t> bounds = SplitRows(a, threads);
  RunInParallel(pool, threads, bounds.size() - 1, [&](int64_t i) {
    for (const Tile& tile : tiles) {
      const float* from_y = packed_y + tile.start * a.rows;
      const float* from_x = packed_x + tile.start * a.columns;
      const bool is_first = tile.first == 0;
      const int64_t begin = bounds[i], end = bounds[i + 1];
      ForWidth<kWidest>(tile.width, [&](auto width) {
        DotRows<width>(a, from_y, from_x, is_first, begin, end, out);
      });
    }
  });
}

// Finds the entries of a mask [inputs, outputs] sorted by both its ends: see
// sparse/index.py. Returns whether there was room for all.
bool FindEntries(const uint8_t* mask, int64_t inputs, int64_t outputs,
                 int64_t size, int32_t* offsets, int32_t* positions,
                 int32_t* in_offsets, int32_t* in_positions, int32_t* order) {
  int64_t found = 0;
  std::vector<int32_t> counts(outputs, 0);
  in_offsets[0] = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    const uint8_t* row = mask + i * outputs;
    for (int64_t o = 0; o < outputs;) {
      uint64_t eight;
      if (o + 8 <= outputs) {
        std::memcpy(&eight, row + o, sizeof(eight));
        if (eight == 0) {
          o += 8;
          continue;
        }
      }
      const int64_t end = std::min(o + 8, outputs);
      for (; o < end; ++o) {
        if (!row[o]) continue;
        if (found == size) return false;
        in_positions[found++] = static_cast<int32_t>(i * outputs + o);
        ++counts[o];
      }
    }
    in_offsets[i + 1] = static_cast<int32_t>(found);
  }
  offsets[0] = 0;
  for (int64_t o = 0; o < outputs; ++o) offsets[o + 1] = offsets[o] + counts[o];
  std::vector<int32_t> next(offsets, offsets + outputs);
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t e = in_offsets[i]; e < in_offsets[i + 1]; ++e) {
      const int64_t o = in_positions[e] - i * outputs;
      const int32_t place = next[o]++;
      positions[place] = static_cast<int32_t>(o * inputs + i);
      order[e] = place;
    }
  }
  for (int32_t* rest : {positions, in_positions, order}) {
    std::fill(rest + found, rest + size,
              static_cast<int32_t>(inputs * outputs - 1));
  }
  return true;
}

Matrix MakeMatrix(const Ints& offsets, const Ints& positions,
                  const Floats& packed) {
  return {static_cast<int64_t>(offsets.element_count()) - 1,
          packed.dimensions()[0], offsets.typed_data(), positions.typed_data()};
}

// x [batch, columns] -> packed [columns, batch], the batch rounded up.
ffi::Error PackImpl(Threads pool, Floats x, FloatResult packed) {
  Pack(pool, x.typed_data(), x.dimensions()[1], MakeTiles(x.dimensions()[0], kWidest),
       packed->typed_data());
  return ffi::Error::Success();
}

ffi::Error MultiplyImpl(Threads pool, Ints offsets, Ints positions,
                        Floats values, Ints order, Floats packed,
                        FloatResult y) {
  const Matrix a = MakeMatrix(offsets, positions, packed);
  const float* in_order = values.typed_data();
  if (order.element_count() > 0) {
    in_order = Permute(pool, in_order, order.typed_data(), a.offsets[a.rows]);
  }
  Multiply(pool, a, in_order, packed.typed_data(), y->dimensions()[0],
           y->typed_data());
  return ffi::Error::Success();
}

ffi::Error DotImpl(Threads pool, Ints offsets, Ints positions, Floats packed_y,
                   Floats packed_x, FloatResult out) {
  const Matrix a = MakeMatrix(offsets, positions, packed_x);
  float* to = out->typed_data();
  const int64_t used = a.offsets[a.rows];
  std::memset(to + used, 0, (out->element_count() - used) * sizeof(float));
  // Examples that Pack added are zero.
  Dot(pool, a, packed_y.typed_data(), packed_x.typed_data(),
      packed_x.dimensions()[1], to);
  return ffi::Error::Success();
}

ffi::Error IndexImpl(ffi::Buffer<ffi::PRED> mask, IntResult offsets,
                     IntResult positions, IntResult in_offsets,
                     IntResult in_positions, IntResult order) {
  const bool fits = FindEntries(
      reinterpret_cast<const uint8_t*>(mask.untyped_data()),
      mask.dimensions()[0], mask.dimensions()[1], positions->element_count(),
      offsets->typed_data(), positions->typed_data(), in_offsets->typed_data(),
      in_positions->typed_data(), order->typed_data());
  if (fits) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(
      "a mask has more connections than there is room for (" +
      std::to_string(positions->element_count()) + ")");
}

}  // namespace
}  // namespace powerprop

XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropIndex, powerprop::IndexImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropPack, powerprop::PackImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropMultiply, powerprop::MultiplyImpl);
XLA_FFI_DEFINE_HANDLER_SYMBOL(PowerpropDot, powerprop::DotImpl);
