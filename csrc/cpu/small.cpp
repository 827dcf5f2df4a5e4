// See small.h. Every matrix is copied so that its long side runs down the rows, and each row, the
// short side, is padded with zeros to whole vectors. Both products that are needed, XᵀY and X S
// with a square S on the short side, then add multiples of whole rows, and no loop has a tail.
#include "small.h"

#include "../rules/rule.h"
#include "../common/multi_tensor.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace deepopt::small {
namespace {

constexpr int64_t kUnit = 8;  // entries that rows are padded to
constexpr int64_t kRows = 4;  // rows of a result that are summed in registers at once
constexpr int64_t kSlab = 64;  // rows of the long side that stay in the nearest cache together

int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// out = left right, or out + left right with `add`; with `upper` only from the diagonal to the
// right. On the left, rows lie `down` apart and the entries of a row `along`; the other two have
// rows of `width`.
struct Product {
  const float* left;
  int64_t down, along;
  const float* right;
  float* out;
  int64_t rows, depth, width;
  bool add, upper;
};

template <int kLanes>
struct Vector {
  typedef float Lanes __attribute__((vector_size(4 * kLanes)));
};

// One block of a product: kRows rows by kVectors vectors, from row i and column j on.
template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void multiply_block(const Product& p, int64_t i, int64_t j) {
  typedef typename Vector<kLanes>::Lanes Lanes;
  Lanes sums[kRows][kVectors], row[kVectors];
  float* out = p.out + i * p.width + j;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Lanes{};
      if (p.add) memcpy(&sums[r][v], out + r * p.width + v * kLanes, sizeof(Lanes));
    }
  }
  const float *left = p.left + i * p.down, *right = p.right + j;
  for (int64_t k = 0; k < p.depth; ++k, left += p.along, right += p.width) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) memcpy(&row[v], right + v * kLanes, sizeof(Lanes));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left[r * p.down] * row[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      memcpy(out + r * p.width + v * kLanes, &sums[r][v], sizeof(Lanes));
    }
  }
}

template <int kLanes>
inline __attribute__((always_inline)) void multiply_in(const Product& p) {
  for (int64_t i = 0; i < p.rows; i += kRows) {
    int64_t j = p.upper ? i / kUnit * kUnit : 0;
    for (; j + 2 * kLanes <= p.width; j += 2 * kLanes) multiply_block<kLanes, 2>(p, i, j);
    for (; j < p.width; j += kLanes) multiply_block<kLanes, 1>(p, i, j);
  }
}

// Vectors are as long as registers, since gcc 12 keeps longer ones in memory. The length does not
// change the order of any sum, so both versions give the same bits.
#if defined(DEEPOPT_LEVELS)
__attribute__((target("arch=x86-64-v3"))) void multiply(const Product& p) { multiply_in<8>(p); }
__attribute__((target("default")))
#endif
void multiply(const Product& p) { multiply_in<4>(p); }

// The largest magnitude. NaN counts as larger than all numbers, because its bits are.
DEEPOPT_CLONES float largest(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, bits_of(x[i]) & 0x7fffffffu);
  return float_of(most);
}

DEEPOPT_CLONES double sum_of_squares(const float* x, int64_t count) {
  typedef double Wide __attribute__((vector_size(8 * kUnit / 2)));
  typedef Vector<kUnit / 2>::Lanes Narrow;
  Wide sums[2] = {};
  for (int64_t i = 0; i < count; i += kUnit) {
    for (int v = 0; v < 2; ++v) {
      Narrow narrow;
      memcpy(&narrow, x + i + v * kUnit / 2, sizeof narrow);
      const Wide wide = __builtin_convertvector(narrow, Wide);
      sums[v] += wide * wide;
    }
  }
  const Wide sum = sums[0] + sums[1];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

DEEPOPT_CLONES void divide(float* x, int64_t count, float by) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) x[i] /= by;
}

// out = b x + c y
DEEPOPT_CLONES void mix(float b, const float* x, float c, const float* y, int64_t count,
                        float* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = b * x[i] + c * y[i];
}

// A sum of x, erased and y; the entries of `erased` lie `stride` apart.
DEEPOPT_CLONES void write(Shares share, const float* x, const float* erased, const float* y,
                          int64_t stride, int64_t count, float* out) {
  const auto [kept, erase, fresh] = share;
  if (stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = kept * x[i] + erase * erased[i] + fresh * y[i];
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    out[i] = kept * x[i] + erase * erased[i * stride] + fresh * y[i];
  }
}

// The layout of matrices of one shape, memory for some of them, and their products.
class Tall {
 public:
  Tall(const Shape& shape, int64_t tall, int64_t square)
      : wide_(shape.rows < shape.columns),
        long_(std::max(shape.rows, shape.columns)),
        short_(std::min(shape.rows, shape.columns)),
        width_(padded(short_, kUnit)),
        memory_((tall * padded(long_, kRows) + square * width_ + kSlab) * width_ / kUnit) {}

 protected:
  float* take(int64_t rows) {
    float* taken = reinterpret_cast<float*>(memory_.data()) + used_;
    used_ += rows * width_;
    return taken;
  }
  float* take_tall() { return take(padded(long_, kRows)); }
  float* take_square() { return take(width_); }
  float* take_slab() { return take(kSlab); }

  int64_t tall_size() const { return long_ * width_; }
  int64_t square_size() const { return short_ * width_; }

  // Copies a matrix of the caller, divided by its largest entry, and returns that. No square of
  // what is copied leaves the range.
  float load(const float* from, float* to) const {
    std::fill_n(to, tall_size(), 0.0f);  // the padding too, where the last matrix may have left NaN
    if (wide_) {
      for (int64_t i = 0; i < short_; ++i) {
        for (int64_t k = 0; k < long_; ++k) to[k * width_ + i] = from[i * long_ + k];
      }
    } else {
      for (int64_t k = 0; k < long_; ++k) std::copy_n(from + k * short_, short_, to + k * width_);
    }
    const float scale = std::max(largest(to, tall_size()), FLT_MIN);
    divide(to, tall_size(), scale);
    return scale;
  }
  // Calls f(first row, rows) for the slabs of a tall matrix.
  template <class F>
  void for_slabs(const F& f) const {
    for (int64_t k = 0; k < long_; k += kSlab) f(k, std::min(kSlab, long_ - k));
  }
  // Adds Xᵀ Y for one slab of rows; the first slab begins the sum.
  void add_inner(const float* x, const float* y, int64_t rows, bool first, float* to) const {
    multiply({x, 1, width_, y, to, short_, rows, width_, !first, x == y});
  }
  // X S
  void product(const float* x, const float* square, int64_t rows, float* to) const {
    multiply({x, width_, 1, square, to, rows, short_, width_, false, false});
  }
  // S S, for a symmetric S.
  void squared(const float* square, float* to) const {
    multiply({square, width_, 1, square, to, short_, short_, width_, false, true});
    mirror(to);
  }
  // Fills what lies below the diagonal from what lies above it.
  void mirror(float* square) const {
    for (int64_t i = 0; i < short_; ++i) {
      float* row = square + i * width_;
      for (int64_t j = 0; j < i / kUnit * kUnit; ++j) row[j] = square[j * width_ + i];
    }
  }
  // Xᵀ X
  void gram(const float* x, float* to) const {
    for_slabs([&](int64_t k, int64_t rows) {
      add_inner(x + k * width_, x + k * width_, rows, k == 0, to);
    });
    mirror(to);
  }

  bool wide_;
  int64_t long_, short_, width_;

 private:
  struct alignas(4 * kUnit) Line {
    float at[kUnit];
  };
  std::vector<Line> memory_;
  int64_t used_ = 0;
};

// Newton-Schulz (Eq 44, Eq 52): X <- X R with R = a I + b G + c G² and G = Xᵀ X, step by step.
class SmallNewtonSchulz : Tall {
 public:
  SmallNewtonSchulz(const Shape& shape, const std::vector<std::array<float, 3>>& coefficients)
      : Tall(shape, 1, 3), coefficients_(coefficients) {}

  void run(const float* from, float* to) {
    load(from, x_);
    divide(x_, tall_size(), std::max(float(std::sqrt(sum_of_squares(x_, tall_size()))), FLT_MIN));
    gram(x_, gram_);
    for (size_t step = 0; step < coefficients_.size(); ++step) {
      const auto& [a, b, c] = coefficients_[step];
      const bool last = step + 1 == coefficients_.size();
      squared(gram_, square_);
      mix(b, gram_, c, square_, square_size(), factor_);
      for (int64_t i = 0; i < short_; ++i) factor_[i * width_ + i] += a;
      // A slab's part of the next G is added while the slab is still in the cache.
      for_slabs([&](int64_t k, int64_t rows) {
        product(x_ + k * width_, factor_, rows, slab_);
        std::copy_n(slab_, rows * width_, x_ + k * width_);
        if (!last) add_inner(slab_, slab_, rows, k == 0, gram_);
      });
      if (!last) mirror(gram_);
    }
    store(to);
  }

 private:
  void store(float* to) const {
    if (wide_) {
      for (int64_t i = 0; i < short_; ++i) {
        for (int64_t k = 0; k < long_; ++k) to[i * long_ + k] = x_[k * width_ + i];
      }
    } else {
      for (int64_t k = 0; k < long_; ++k) std::copy_n(x_ + k * width_, short_, to + k * short_);
    }
  }

  const std::vector<std::array<float, 3>>& coefficients_;
  float *x_ = take_tall(), *slab_ = take_slab();
  float *gram_ = take_square(), *square_ = take_square(), *factor_ = take_square();
};

// The delta write (Eq 49): M <- retention M - rate M Kᵀ K + (1 - retention) G, and the look-ahead.
class SmallDeltaWrite : Tall {
 public:
  explicit SmallDeltaWrite(const Shape& shape) : Tall(shape, 2, 2) {}

  void run(const Memory<const float>& old, const float* grad, double rate, double retention,
           const Memory<float>& result, float* ahead) {
    const double scale = load(grad, keys_), size = load(old.momentum, momentum_);
    gram(keys_, gram_);
    squared(gram_, square_);
    const double root = std::pow(sum_of_squares(square_, square_size()), 0.125);
    const double whole_bound = root * scale;
    const double cut = whole_bound > kLargest ? kLargest / whole_bound : 1.0;
    const double bound = whole_bound * cut;
    const double norm = std::sqrt(0.9 * *old.norm * *old.norm + 0.1 * bound * bound);
    const double ratio = scale * cut / std::max(std::max(norm, bound), double(FLT_MIN));
    const double erase = rate * ratio * ratio;
    // M Kᵀ K takes two products. One is on the short side: Kᵀ M for wide matrices, Kᵀ K for tall
    // ones.
    if (wide_) {
      for_slabs([&](int64_t k, int64_t rows) {
        add_inner(keys_ + k * width_, momentum_ + k * width_, rows, k == 0, square_);
      });
    }
    const DeltaShares shares(retention, *old.erasure, cut);
    Shares written = shares.written, looked = shares.ahead;
    written.erased *= float(erase * size), looked.erased *= float(erase * size);
    double erased = 0;
    for_slabs([&](int64_t k, int64_t rows) {
      product((wide_ ? keys_ : momentum_) + k * width_, wide_ ? square_ : gram_, rows, slab_);
      erased += sum_of_squares(slab_, rows * width_);
      const auto part = [&](int64_t at, const float* from, int64_t stride, int64_t count) {
        const float *x = old.momentum + at, *y = grad + at;
        write(written, x, from, y, stride, count, result.momentum + at);
        write(looked, x, from, y, stride, count, ahead + at);
      };
      if (wide_) {
        for (int64_t i = 0; i < short_; ++i) part(i * long_ + k, slab_ + i, width_, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) part((k + i) * short_, slab_ + i * width_, 1, short_);
      }
    });
    const double whole = sum_of_squares(momentum_, tall_size());
    const double share = erase * std::sqrt(erased / std::max(whole, double(FLT_MIN)));
    *result.norm = float(norm);
    *result.erasure = float(*old.erasure + 0.1 * (share - *old.erasure));
  }

 private:
  float *keys_ = take_tall(), *momentum_ = take_tall();
  float *gram_ = take_square(), *square_ = take_square(), *slab_ = take_slab();
};

// Calls f(first, last) for parts of a batch, each large enough to be worth a thread.
template <class F>
void share_batch(const Shape& shape, const F& f) {
  const int64_t work = shape.rows * shape.columns * std::min(shape.rows, shape.columns);
  const int64_t grain = std::max<int64_t>(1, kWorth * 2 / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, shape.batch, grain, f);
}

}  // namespace

void newton_schulz(const float* matrices, const Shape& shape,
                   const std::vector<std::array<float, 3>>& coefficients, float* result) {
  const int64_t size = shape.rows * shape.columns;
  if (!size) return;
  share_batch(shape, [&](int64_t first, int64_t last) {
    SmallNewtonSchulz work(shape, coefficients);
    for (int64_t b = first; b < last; ++b) work.run(matrices + b * size, result + b * size);
  });
}

void delta_write(const Memory<const float>& old, const float* grad, const Shape& shape, double rate,
                 double retention, const Memory<float>& result, float* ahead) {
  const int64_t size = shape.rows * shape.columns;
  share_batch(shape, [&](int64_t first, int64_t last) {
    SmallDeltaWrite work(shape);
    for (int64_t b = first; b < last; ++b) {
      work.run({old.momentum + b * size, old.norm + b, old.erasure + b}, grad + b * size, rate,
               retention, {result.momentum + b * size, result.norm + b, result.erasure + b},
               ahead + b * size);
    }
  });
}

}  // namespace deepopt::small
