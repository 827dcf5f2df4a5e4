// Matrix products in bfloat16 with float32 accumulation, for processors with AVX512-BF16.
//
// Everything rests on one instruction. vdpbf16ps takes sixteen pairs of bfloat16 from each of two
// registers, and adds the product of each two pairs to one of sixteen float32 sums. Operands are
// packed so that what it takes lies together:
//
//   panel p of a matrix A holds its rows 32 p ... 32 p + 31. Word [t][i] of a panel is the pair
//   (A[32 p + i][2 t], A[32 p + i][2 t + 1]); a panel is contiguous, t its slow index.
//
// A product of two packed matrices is A Bᵀ: both run over the same depth, and each tile of 8 rows
// of A by 32 rows of B keeps its sixteen registers of sums from the first pair to the last. Sides
// are padded with zeros to multiples of 32, so that only loads from the caller's matrices and
// stores to them deal with tails.
//
// A product of a matrix with its own transpose, and of two symmetric matrices that commute, is
// symmetric. Only its lower triangle of 32 x 32 blocks is computed, and of a block on the diagonal
// all but the upper right quarter. A packed result, which will be an operand again, gets the rest
// by mirroring.
#pragma once

#include "avx512_bf16.h"

#ifdef DEEPOPT_AVX512_BF16
#include <immintrin.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

DEEPOPT_AVX512_BF16_BEGIN

// gcc 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace deepopt::bfloat16 {

constexpr int64_t kPanel = 32;  // rows of a panel
constexpr int64_t kStrip = 8;  // rows of a tile
constexpr int64_t kStrips = kPanel / kStrip;
constexpr int64_t kBlock = kPanel * kPanel;
constexpr int64_t kHalf = kPanel / 2;  // side of the quarter of a diagonal block that is left out

inline int64_t panels_for(int64_t rows) {
  return (rows + kPanel - 1) / kPanel;
}

// A packed matrix, which does not own its memory.
struct Panels {
  uint32_t* words;
  int64_t panels, pairs;  // rows / 32 and depth / 2, padded

  uint32_t* panel(int64_t p) const {
    return words + p * kPanel * pairs;
  }
};

// Memory for panels and blocks, handed out in order. Much of it comes in large pages, because
// touching small ones for the first time takes as long as a product. Large pages have to be cleared
// as well, so each thread keeps one block of them for the next Scratch.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const int64_t unit = bytes < kPage ? 64 : kPage;
    block_.bytes = (bytes + unit - 1) / unit * unit;
    if (unit == kPage && block_.bytes <= kept().bytes) {
      block_ = std::exchange(kept(), Block{});
      return;
    }
    block_.base = static_cast<char*>(std::aligned_alloc(unit, block_.bytes));
    if (!block_.base) throw std::bad_alloc();
    if (unit == kPage) madvise(block_.base, block_.bytes, MADV_HUGEPAGE);
  }
  ~Scratch() {
    if (block_.bytes >= kPage && block_.bytes <= kMostKept) std::swap(block_, kept());
    std::free(block_.base);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Panels panels(int64_t panels, int64_t depth_panels) {
    const int64_t pairs = depth_panels * (kPanel / 2);
    return {take<uint32_t>(panels * kPanel * pairs), panels, pairs};
  }
  float* blocks(int64_t panels) {
    return take<float>(panels * (panels + 1) / 2 * kBlock);
  }
  static int64_t panels_bytes(int64_t panels, int64_t depth_panels) {
    return panels * depth_panels * kBlock * 2;
  }
  static int64_t blocks_bytes(int64_t panels) {
    return panels * (panels + 1) / 2 * kBlock * 4;
  }

 private:
  static constexpr int64_t kPage = int64_t{1} << 21;
  static constexpr int64_t kMostKept = int64_t{1} << 25;  // 768 x 3072 takes two thirds of it

  struct Block {
    char* base = nullptr;
    int64_t bytes = 0;
  };
  static Block& kept() {
    struct Owner : Block {
      ~Owner() {
        std::free(base);
      }
    };
    static thread_local Owner block;
    return block;
  }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(block_.base + used_);
    used_ += count * int64_t{sizeof(T)};  // a multiple of 64, as blocks and panels are
    return taken;
  }

  Block block_;
  int64_t used_ = 0;
};

// 8 rows by 32 columns of float32, in registers.
struct Tile {
  __m512 at[kStrip][2];
};

// Multiplies the eight rows of one panel that begin at `a` with the 32 rows of panel `b`. With one
// half it takes the first 16 of them, and the other half of the tile is zero.
template <int kHalves = 2>
inline Tile multiply(const uint32_t* a, const uint32_t* b, int64_t pairs) {
  Tile sum;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) sum.at[i][0] = sum.at[i][1] = _mm512_setzero_ps();
  for (int64_t t = 0; t < pairs; ++t, a += kPanel, b += kPanel) {
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
        const auto rows = (__m512bh)_mm512_loadu_si512(b + 16 * half);
        sum.at[i][half] = _mm512_dpbf16_ps(sum.at[i][half], rows, pair);
      }
    }
  }
  return sum;
}

// Two rows of a tile as packed words: (upper, lower) side by side, one word per column.
inline __m512i paired(__m512 upper, __m512 lower) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(upper));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lower));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Packs a tile transposed: its columns, or the first half of them, become rows of `panel`, and its
// rows lie along the depth.
template <int kHalves = 2>
inline void pack_mirrored(const Tile& tile, uint32_t* panel, int64_t first_row) {
  uint32_t* words = panel + first_row / 2 * kPanel;
#pragma GCC unroll 4
  for (int i = 0; i < kStrip; i += 2, words += kPanel) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      _mm512_storeu_si512(words + 16 * half, paired(tile.at[i][half], tile.at[i + 1][half]));
    }
  }
}

// Packs a tile, or its first half, as it is: its rows are rows `strip` ... `strip` + 7 of `panel`,
// its columns lie along the depth from `first_column` on. A transposition of 8 x 16 words.
template <int kHalves = 2>
inline void pack(const Tile& tile, uint32_t* panel, int64_t strip, int64_t first_column) {
  __m512i row[kStrip], twos[kStrip], fours[kStrip];
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    row[i] = (__m512i)_mm512_cvtne2ps_pbh(tile.at[i][1], tile.at[i][0]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kStrip; i += 2) {
    twos[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);  // columns 0, 1 of each 128 bits
    twos[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);  // columns 2, 3
  }
#pragma GCC unroll 2
  for (int i = 0; i < kStrip; i += 4) {  // fours[i + c]: column c of each 128 bits, rows i ... i + 3
    fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
  }
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  uint32_t* words = panel + first_column / 2 * kPanel + strip;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // word column 4 l + c lies in 128 bits number l
    const __m512i low = _mm512_permutex2var_epi64(fours[c], front, fours[4 + c]);
    const __m512i high = _mm512_permutex2var_epi64(fours[c], back, fours[4 + c]);
    const auto store = [&](int column, __m256i eight) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + column * kPanel), eight);
    };
    store(c, _mm512_castsi512_si256(low));
    store(4 + c, _mm512_extracti64x4_epi64(low, 1));
    if (kHalves == 1) continue;
    store(8 + c, _mm512_castsi512_si256(high));
    store(12 + c, _mm512_extracti64x4_epi64(high, 1));
  }
}

// The tile that pack_mirrored() wrote.
inline Tile unpack_mirrored(const uint32_t* panel, int64_t first_row) {
  const uint32_t* words = panel + first_row / 2 * kPanel;
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  Tile tile;
#pragma GCC unroll 4
  for (int i = 0; i < kStrip; i += 2, words += kPanel) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i pairs = _mm512_loadu_si512(words + 16 * half);
      tile.at[i][half] = (__m512)_mm512_slli_epi32(pairs, 16);
      tile.at[i + 1][half] = (__m512)_mm512_and_si512(pairs, high);
    }
  }
  return tile;
}

// A row-major float32 matrix of the caller. Beyond its sides it reads as zero and is not written.
template <class T>
struct Rows {
  T* data;
  int64_t rows, columns;

  Tile load(int64_t row, int64_t column) const {
    Tile tile;
    const T* at = data + row * columns + column;
    if (is_whole(row, column)) {
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i, at += columns) {
        tile.at[i][0] = _mm512_loadu_ps(at);
        tile.at[i][1] = _mm512_loadu_ps(at + 16);
      }
      return tile;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i, at += columns) {
      tile.at[i][0] = _mm512_maskz_loadu_ps(mask(row + i, column), at);
      tile.at[i][1] = _mm512_maskz_loadu_ps(mask(row + i, column + 16), at + 16);
    }
    return tile;
  }
  void store(int64_t row, int64_t column, const Tile& tile) const {
    T* at = data + row * columns + column;
    if (is_whole(row, column)) {
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i, at += columns) {
        _mm512_storeu_ps(at, tile.at[i][0]);
        _mm512_storeu_ps(at + 16, tile.at[i][1]);
      }
      return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i, at += columns) {
      _mm512_mask_storeu_ps(at, mask(row + i, column), tile.at[i][0]);
      _mm512_mask_storeu_ps(at + 16, mask(row + i, column + 16), tile.at[i][1]);
    }
  }

 private:
  bool is_whole(int64_t row, int64_t column) const {
    return row + kStrip <= rows && column + kPanel <= columns;
  }
  __mmask16 mask(int64_t row, int64_t column) const {
    const int64_t left = row < rows ? std::clamp<int64_t>(columns - column, 0, 16) : 0;
    return static_cast<__mmask16>((1u << left) - 1);
  }
};

// 1 / norm as a product of two floats, for norms whose own reciprocal is no float. Zero gives zero,
// so that a zero matrix stays zero; NaN and infinity give NaN.
struct Reciprocal {
  float first, second;

  explicit Reciprocal(double norm) {
    int exponent = 0;
    std::frexp(norm, &exponent);
    first = norm > 0.0 ? static_cast<float>(std::ldexp(1.0, -exponent / 2)) : 0.0f;
    second = norm > 0.0 ? static_cast<float>(std::ldexp(1.0, exponent / 2) / norm) : 0.0f;
    if (!(norm < INFINITY)) first = second = NAN;
  }
};

inline double sum_of_squares(const float* data, int64_t count) {
  __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(),
                     _mm512_setzero_pd()};
  for (int64_t i = 0; i < count; i += 32) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int64_t left = std::clamp<int64_t>(count - i - 8 * k, 0, 8);
      const auto mask = static_cast<__mmask8>((1u << left) - 1);
      const __m512d x = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, data + i + 8 * k));
      sums[k] = _mm512_fmadd_pd(x, x, sums[k]);
    }
  }
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3])));
}

inline double total(const std::vector<double>& sums) {
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return sum;
}

// ‖x‖. The chunks do not depend on the number of threads, and so neither does the sum.
inline double norm(const float* data, int64_t count) {
  constexpr int64_t chunk = 1 << 13, worth = 4;  // entries; chunks that are worth a thread
  std::vector<double> sums((count + chunk - 1) / chunk);
  torch::stable::parallel_for(0, sums.size(), worth, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      sums[at] = sum_of_squares(data + at * chunk, std::min(chunk, count - at * chunk));
    }
  });
  return std::sqrt(total(sums));
}

// The sum of squares of a tile, or of its first half.
template <int kHalves = 2>
inline double sum_of_squares(const Tile& tile) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; ++half) {
      sums[half] = _mm512_fmadd_ps(tile.at[i][half], tile.at[i][half], sums[half]);
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

// a x + y
inline Tile added(float a, const Tile& x, const Tile& y) {
  const __m512 factor = _mm512_set1_ps(a);
  Tile sum;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    sum.at[i][0] = _mm512_fmadd_ps(factor, x.at[i][0], y.at[i][0]);
    sum.at[i][1] = _mm512_fmadd_ps(factor, x.at[i][1], y.at[i][1]);
  }
  return sum;
}

inline Tile scaled(float a, const Tile& x) {
  const __m512 factor = _mm512_set1_ps(a);
  Tile product;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    product.at[i][0] = _mm512_mul_ps(factor, x.at[i][0]);
    product.at[i][1] = _mm512_mul_ps(factor, x.at[i][1]);
  }
  return product;
}

// The tile rounded to bfloat16, as it would come out of packing and unpacking.
inline Tile rounded(const Tile& x) {
  Tile tile;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto narrow = (__m256i)_mm512_cvtneps_pbh(x.at[i][half]);
      tile.at[i][half] = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
    }
  }
  return tile;
}

// Adds a number to the diagonal of a block, for the strip `x` of it that begins at row `strip`.
inline Tile shifted(float shift, const Tile& x, int64_t strip) {
  const __m512 number = _mm512_set1_ps(shift);
  Tile sum;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    const uint32_t bit = uint32_t{1} << (strip + i);
    sum.at[i][0] = _mm512_mask_add_ps(x.at[i][0], static_cast<__mmask16>(bit), x.at[i][0], number);
    sum.at[i][1] =
        _mm512_mask_add_ps(x.at[i][1], static_cast<__mmask16>(bit >> 16), x.at[i][1], number);
  }
  return sum;
}

// A strip of a block of 32 x 32 float32.
inline Tile load(const float* at) {
  Tile tile;
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    tile.at[i][0] = _mm512_loadu_ps(at + i * kPanel);
    tile.at[i][1] = _mm512_loadu_ps(at + i * kPanel + 16);
  }
  return tile;
}

inline void store(float* at, const Tile& tile) {
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i) {
    _mm512_storeu_ps(at + i * kPanel, tile.at[i][0]);
    _mm512_storeu_ps(at + i * kPanel + 16, tile.at[i][1]);
  }
}

// Packs M / ‖M‖ into `rows`, panels of its rows, and into `columns`, panels of its columns. Either
// may be null. It walks along eight rows at a time, which the processor recognizes and reads ahead.
inline void pack_matrix(
    Rows<const float> matrix, double norm, const Panels* rows, const Panels* columns) {
  const Reciprocal factor(norm);
  const int64_t strips = panels_for(matrix.rows) * kStrips;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kStrip; row < last * kStrip; row += kStrip) {
      for (int64_t column = 0; column < panels_for(matrix.columns) * kPanel; column += kPanel) {
        const Tile tile = scaled(factor.second, scaled(factor.first, matrix.load(row, column)));
        if (rows) pack(tile, rows->panel(row / kPanel), row % kPanel, column);
        if (columns) pack_mirrored(tile, columns->panel(column / kPanel), row);
      }
    }
  });
}

// Calls use(block, I, J, strip) for every strip in the lower triangle of blocks of a matrix, which
// threads share strip by strip: six panels have 21 blocks, too few for sixteen threads. `block`
// counts the blocks: row of blocks by row of blocks.
template <class Use>
void over_triangle(int64_t panels, const Use& use) {
  const int64_t count = panels * (panels + 1) / 2 * kStrips;
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    int64_t block = first / kStrips, i = 0;
    while ((i + 1) * (i + 2) / 2 <= block) ++i;
    int64_t j = block - i * (i + 1) / 2;
    for (int64_t at = first; at < last; ++at) {
      use(block, i, j, at % kStrips * kStrip);
      if ((at + 1) % kStrips) continue;
      ++block;
      if (++j > i) ++i, j = 0;
    }
  });
}

// Calls use(block, I, J, strip, tile) for every tile in the lower triangle of blocks of A Bᵀ, which
// must be symmetric. In a block on the diagonal the upper right quarter is not computed and zero.
// Whoever needs it mirrors the lower left quarter, and must not store the zeros: they may come
// later.
template <class Use>
void symmetric_product(const Panels& a, const Panels& b, const Use& use) {
  over_triangle(a.panels, [&](int64_t block, int64_t i, int64_t j, int64_t strip) {
    const auto *rows = a.panel(i) + strip, *columns = b.panel(j);
    const bool half = i == j && strip < kHalf;
    use(block, i, j, strip,
        half ? multiply<1>(rows, columns, a.pairs) : multiply(rows, columns, a.pairs));
  });
}

// Where a symmetric matrix is put, with `shift` added to its diagonal: as blocks of float32, which
// lack what symmetric_product() leaves out, packed, or both.
struct Target {
  float* blocks = nullptr;
  const Panels* packed = nullptr;
  float shift = 0.0f;

  void put(int64_t block, int64_t i, int64_t j, int64_t strip, Tile tile) const {
    if (shift != 0.0f && i == j) tile = shifted(shift, tile, strip);
    if (blocks) store(blocks + block * kBlock + strip * kPanel, tile);
    if (packed) {
      if (i == j &&
          strip < kHalf) {  // another strip, maybe on another thread, mirrors the other half
        pack<1>(tile, packed->panel(i), strip, j * kPanel);
        return;
      }
      pack(tile, packed->panel(i), strip, j * kPanel);
      if (i != j) {
        pack_mirrored(tile, packed->panel(j), i * kPanel + strip);
      } else {
        pack_mirrored<1>(tile, packed->panel(j), i * kPanel + strip);
      }
    }
  }
};

// Puts the symmetric A Bᵀ + c C into a target; C is given as blocks, or null for none.
inline void symmetric_product(
    const Panels& a, const Panels& b, const Target& target, float c = 0.0f,
    const float* addend = nullptr) {
  symmetric_product(
      a, b, [&](int64_t block, int64_t i, int64_t j, int64_t strip, const Tile& product) {
        Tile tile = product;
        if (addend) tile = added(c, load(addend + block * kBlock + strip * kPanel), tile);
        target.put(block, i, j, strip, tile);
      });
}

// 32 rows by 32 columns of float32, a block as symmetric_product() lays it down.
struct Block {
  float* at;

  __m512 load(int64_t row, int64_t half) const {
    return _mm512_loadu_ps(at + row * kPanel + 16 * half);
  }
  void store(int64_t row, int64_t half, __m512 x) const {
    _mm512_storeu_ps(at + row * kPanel + 16 * half, x);
  }
  // row <- a row
  void scale(int64_t row, float a) const {
    for (int half = 0; half < 2; ++half) {
      store(row, half, _mm512_mul_ps(_mm512_set1_ps(a), load(row, half)));
    }
  }
  // row <- row - a other
  void subtract(int64_t row, float a, int64_t other) const {
    for (int half = 0; half < 2; ++half) {
      store(row, half, _mm512_fnmadd_ps(_mm512_set1_ps(a), load(other, half), load(row, half)));
    }
  }
};

// x - Aᵀ B for one strip of the result: the columns of A from `a` on, all 32 columns of B.
inline Tile subtracted(Tile x, const float* a, const float* b) {
  for (int64_t t = 0; t < kPanel; ++t, a += kPanel, b += kPanel) {
    const __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      const __m512 factor = _mm512_set1_ps(a[i]);
      x.at[i][0] = _mm512_fnmadd_ps(factor, left, x.at[i][0]);
      x.at[i][1] = _mm512_fnmadd_ps(factor, right, x.at[i][1]);
    }
  }
  return x;
}

// Whether all eigenvalues of the symmetric G, given by its lower triangle of blocks, lie below a
// limit. They do if limit I - G has a Cholesky factor, an M with Mᵀ M = limit I - G. M overwrites G,
// whose triangle it fits. It is computed from the last row of blocks up, so that the rows of every
// block are read as they lie.
//
// In float32 the answer is exact for a matrix that differs from G by the rounding of r additions.
inline bool is_below(float limit, float* blocks, int64_t panels) {
  const auto block = [&](int64_t i, int64_t j) {
    return Block{blocks + (i * (i + 1) / 2 + j) * kBlock};
  };
  // Replaces block (i, j) by that of limit I - G, less what the rows of blocks below have taken.
  const auto remainder = [&](int64_t i, int64_t j) {
    for (int64_t strip = 0; strip < kPanel; strip += kStrip) {
      Tile tile = scaled(-1.0f, load(block(i, j).at + strip * kPanel));
      if (i == j) tile = shifted(limit, tile, strip);
      for (int64_t k = i + 1; k < panels; ++k) {
        tile = subtracted(tile, block(k, i).at + strip, block(k, j).at);
      }
      store(block(i, j).at + strip * kPanel, tile);
    }
  };
  for (int64_t i = panels - 1; i >= 0; --i) {
    const Block pivots = block(i, i);
    float reciprocal[kPanel];
    remainder(i, i);
    for (int64_t row = kPanel - 1; row >= 0; --row) {
      const float pivot = pivots.at[row * kPanel + row];
      if (!(pivot > 0.0f)) return false;  // for NaN as well
      reciprocal[row] = 1.0f / std::sqrt(pivot);
      pivots.scale(row, reciprocal[row]);
      for (int64_t above = 0; above < row; ++above) {
        pivots.subtract(above, pivots.at[row * kPanel + above], row);
      }
    }
    torch::stable::parallel_for(0, i, 1, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        remainder(i, j);
        for (int64_t row = kPanel - 1; row >= 0; --row) {
          block(i, j).scale(row, reciprocal[row]);
          for (int64_t above = 0; above < row; ++above) {
            block(i, j).subtract(above, pivots.at[row * kPanel + above], row);
          }
        }
      }
    });
  }
  return true;
}

}  // namespace deepopt::bfloat16

DEEPOPT_AVX512_BF16_END
#endif  // DEEPOPT_AVX512_BF16
