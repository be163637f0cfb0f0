// Examples side by side: a batch in tiles, of which each feature is a vector.

#ifndef POWERPROP_JAX_SPARSE_NATIVE_TILES_H_
#define POWERPROP_JAX_SPARSE_NATIVE_TILES_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.h"

namespace powerprop {

// The examples of a tile, as vectors.
template <int kWidth>
struct Examples {
  static constexpr int kLanes = kWidth < 16 ? kWidth : 16;
  static constexpr int kVectors = kWidth / kLanes;
  using Vector = typename Lanes<kLanes>::Type;
};

// Examples [first, first + width) of a batch; those past its end are zero.
struct Tile {
  int64_t first;
  int64_t width;
  int64_t used;
  // Where the tile lies in the packed array, in floats per feature.
  int64_t start;
};

// Tiles of at most so many examples; the last may be narrower.
inline std::vector<Tile> MakeTiles(int64_t batch, int64_t widest) {
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < batch;) {
    int64_t width = widest;
    const int64_t left = batch - first;
    while (width > 4 && width / 2 >= left) width /= 2;
    const int64_t start =
        tiles.empty() ? 0 : tiles.back().start + tiles.back().width;
    tiles.push_back({first, width, std::min(width, left), start});
    first += width;
  }
  return tiles;
}

inline int64_t PackedWidth(const std::vector<Tile>& tiles) {
  return tiles.back().start + tiles.back().width;
}

// Calls a template with the width of a tile: 4, 8, and so on to kWidest.
template <int kWidest, typename Call>
void ForWidth(int64_t width, const Call& call) {
  if (width == kWidest) {
    call(std::integral_constant<int, kWidest>());
  } else if constexpr (kWidest > 4) {
    ForWidth<kWidest / 2>(width, call);
  }
}

}  // namespace powerprop

#endif  // POWERPROP_JAX_SPARSE_NATIVE_TILES_H_
