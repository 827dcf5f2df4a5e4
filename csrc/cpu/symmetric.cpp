// deepopt::newton_schulz and deepopt::delta_write on the CPU. Large matrices are multiplied in
// bfloat16 with float32 accumulation (symmetric.h), one matrix after the other. Small ones go to
// small.h.
#include "symmetric.h"

#include "small.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using Coefficients = std::array<float, 3>;

// The shortest side for which the delta write rounds to bfloat16: SHORTEST in
// deepopt/ops/products.py.
constexpr int64_t kShortest = 64;

void check(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(), name,
      " must be a float32 tensor on the CPU");
}

}  // namespace

#ifdef DEEPOPT_AVX512_BF16
DEEPOPT_AVX512_BF16_BEGIN

namespace {

using namespace deepopt::bfloat16;
using deepopt::small::DeltaShares;
using deepopt::small::kLargest;
using deepopt::small::Shares;

// Calls body(first, last) for parts of a batch. Each thread takes the same number of matrices. All
// of them share the products of those left over, one matrix after the other. A matrix comes out the
// same either way.
template <class Body>
void over_batch(int64_t batch, const Body& body) {
  const int64_t shared = batch % static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, batch - shared, 1, body);
  if (shared) body(batch - shared, batch);
}

// The largest |a x + b x³ + c x⁵| for x in [0, upper], to about 1e-5 of it.
double largest(const Coefficients& abc, double upper) {
  constexpr int64_t points = 4096;
  double value = 0.0;
  for (int64_t i = 1; i <= points; ++i) {
    const double x = upper * static_cast<double>(i) / points, square = x * x;
    value = std::max(value, std::abs(x * (abc[0] + square * (abc[1] + square * abc[2]))));
  }
  return value;
}

// Newton-Schulz (Eq 44, Eq 52) of m x n matrices, with the memory for it.
//
// X is M or Mᵀ, with the short side first. A step is X ← R X with R = a I + P and P = b G + c G²,
// where G = X Xᵀ. The matrix is held twice, as panels of its rows and of its columns: one is
// multiplied with R, the other makes G.
class BFloat16NewtonSchulz {
 public:
  BFloat16NewtonSchulz(int64_t rows, int64_t columns, std::vector<Coefficients> coefficients)
      : coefficients_(std::move(coefficients)),
        m_(rows),
        n_(columns),
        wide_(rows <= columns),
        short_(panels_for(std::min(rows, columns))),
        long_(panels_for(std::max(rows, columns))),
        scratch_(3 * Scratch::panels_bytes(short_, long_) +
                 4 * Scratch::panels_bytes(short_, short_) + Scratch::blocks_bytes(short_)),
        rows_(scratch_.panels(panels_for(m_), panels_for(n_))),
        columns_(scratch_.panels(panels_for(n_), panels_for(m_))),
        fresh_(scratch_.panels(long_, short_)),
        gram_(scratch_.panels(short_, short_)),
        change_(scratch_.panels(short_, short_)),
        factor_(scratch_.panels(short_, short_)),
        product_(scratch_.panels(short_, short_)),
        gram32_(scratch_.blocks(short_)),
        pairs_(coefficients_.size() >= 5 && 4 * std::max(m_, n_) >= 5 * std::min(m_, n_)) {
    if (!pairs_) return;
    // Half of a percent above what two exact steps reach: less than the hundredth from which on the
    // next polynomial grows, and more than rounding usually adds.
    const double limit = 1.005 * largest(coefficients_[1], largest(coefficients_[0], 1.0));
    square_limit_ = static_cast<float>(limit * limit);
  }

  void run(const float* from, float* to) {
    const bool certifiable = pairs_ && square_limit_ < INFINITY;
    if (!certifiable || !iterate(from, to, true)) iterate(from, to, false);
  }

 private:
  // Products on the long side, X Xᵀ and R X, cost the aspect ratio r, those on the short side cost
  // 1, and symmetric ones half of that. Two steps on one G, after which X follows once, cost 3/2 r
  // + 5/2 in place of 3 r + 1. So the first two and the last two of five or more steps are taken in
  // pairs. Three are never taken on one G: rounding moves it away from the true X Xᵀ, more with
  // every step, and only a new G corrects that.
  //
  // After the first pair, singular values reach up to one hundredth below the edge beyond which the
  // next polynomial grows without bound. Where few rows carry a matrix, their rounding does not
  // average out, and pushes one matrix in a thousand over that edge. So the first pair is
  // certified: the true Gram matrix, which the third step needs anyway, must have no eigenvalue
  // above what exact steps can reach. If it has, this returns false, nothing has been written, and
  // the caller takes the steps one by one.
  bool iterate(const float* from, float* to, bool first_pair) {
    pack_matrix({from, m_, n_}, norm(from, m_ * n_), &rows_, &columns_);
    const auto steps = static_cast<int64_t>(coefficients_.size());
    for (int64_t step = 0; step < steps;) {
      const Coefficients& abc = coefficients_[step];
      if ((first_pair && step == 0) || (pairs_ && step == steps - 2)) {
        const Panels& factor = two_steps(abc, coefficients_[step + 1]);
        step += 2;
        multiply_by(factor, 0.0f, step == steps ? to : nullptr);
      } else {
        const Panels& change = one_step(abc);
        if (first_pair && step == 2 && !is_below(square_limit_, gram32_, short_)) return false;
        step += 1;
        multiply_by(change, abc[0], step == steps ? to : nullptr);
      }
    }
    return true;
  }

  // Returns P, for X ← a X + P X, and leaves G in gram32_.
  const Panels& one_step(const Coefficients& abc) {
    make_gram();
    make_change(abc, {nullptr, &change_});
    return change_;
  }

  // Returns R' R, for the R of this step and the R' of the next, whose G' is R G R. All of them are
  // polynomials in G, so they commute and every product is symmetric.
  //
  // R G is computed as a G + P G with the first term in float32. Small eigenvalues of G then meet
  // no rounding but that of P G, where P is as small as they are. All other products take R itself,
  // which large eigenvalues need: for them a and P nearly cancel.
  const Panels& two_steps(const Coefficients& abc, const Coefficients& next) {
    make_gram();
    make_change(abc, {nullptr, &change_}, {nullptr, &factor_, abc[0]});
    symmetric_product(change_, gram_, {nullptr, &product_}, abc[0], gram32_);
    symmetric_product(factor_, product_, {gram32_, &gram_});
    make_change(next, {nullptr, &change_, next[0]});
    symmetric_product(change_, factor_, {nullptr, &product_});
    return product_;
  }

  void make_gram() {
    const Panels& x = wide_ ? rows_ : columns_;
    symmetric_product(x, x, {gram32_, &gram_});
  }

  // P = b G + c G², with the rounded G in both terms. A G that is a little wrong makes R a little
  // wrong. With two different G, the terms would not cancel where R is smallest and flat.
  void make_change(const Coefficients& abc, const Target& target, const Target& second = {}) {
    symmetric_product(
        gram_, gram_, [&](int64_t block, int64_t i, int64_t j, int64_t strip, const Tile& square) {
          const Tile gram = rounded(load(gram32_ + block * kBlock + strip * kPanel));
          const Tile change = added(abc[1], gram, scaled(abc[2], square));
          target.put(block, i, j, strip, change);
          if (second.packed) second.put(block, i, j, strip, change);
        });
  }

  // X ← own X + factor X. The result is packed again, or where `to` is given written into the
  // caller's matrix alone. New panels of the long side are written beside the old ones, which other
  // blocks still read: so blocks do not depend on each other.
  void multiply_by(const Panels& factor, float own, float* to) {
    const Panels& left = wide_ ? factor : rows_;
    const Panels& right = wide_ ? columns_ : factor;
    const Panels& rows = wide_ ? rows_ : fresh_;
    const Panels& columns = wide_ ? fresh_ : columns_;
    const Rows<float> out{to, m_, n_};
    torch::stable::parallel_for(0, long_ * short_, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t at = block / short_, other = block % short_;
        const int64_t i = wide_ ? other : at, j = wide_ ? at : other;
        for (int64_t strip = 0; strip < kPanel; strip += kStrip) {
          const int64_t row = i * kPanel + strip, column = j * kPanel;
          Tile tile = multiply(left.panel(i) + strip, right.panel(j), factor.pairs);
          if (own != 0.0f) tile = added(own, unpack_mirrored(columns_.panel(j), row), tile);
          if (to) {
            out.store(row, column, tile);
          } else {
            pack(tile, rows.panel(i), strip, column);
            pack_mirrored(tile, columns.panel(j), row);
          }
        }
      }
    });
    if (!to) std::swap(wide_ ? columns_ : rows_, fresh_);
  }

  std::vector<Coefficients> coefficients_;
  int64_t m_, n_;
  bool wide_;
  int64_t short_, long_;  // in panels
  Scratch scratch_;
  Panels rows_, columns_, fresh_;
  Panels gram_, change_, factor_, product_;
  float* gram32_;
  bool pairs_;
  float square_limit_ = INFINITY;
};

// The delta write (Eq 49), with the memory for it:
// M ← retention M - rate M Kᵀ K + (1 - retention) G, and the look-ahead.
class BFloat16DeltaWrite {
 public:
  BFloat16DeltaWrite(int64_t rows, int64_t columns)
      : m_(rows),
        n_(columns),
        wide_(rows < columns),
        short_(panels_for(std::min(rows, columns))),
        scratch_(3 * Scratch::panels_bytes(panels_for(rows), panels_for(columns)) +
                 2 * Scratch::panels_bytes(short_, short_)),
        momentum_(scratch_.panels(panels_for(m_), panels_for(n_))),
        key_rows_(scratch_.panels(panels_for(m_), panels_for(n_))),
        key_columns_(scratch_.panels(panels_for(n_), panels_for(m_))),
        gram_(scratch_.panels(short_, short_)),
        recalled_(scratch_.panels(short_, short_)) {}

  struct Average {
    float norm, erasure;
  };

  // Writes the new momentum and the look-ahead, and returns the new averages.
  Average run(
      const float* momentum, const float* grad, Average old, double retention, double rate,
      float* to, float* ahead) {
    const double grad_norm = norm(grad, m_ * n_);
    pack_matrix({grad, m_, n_}, grad_norm, wide_ ? &key_rows_ : nullptr, &key_columns_);
    const double momentum_norm = norm(momentum, m_ * n_);
    pack_matrix({momentum, m_, n_}, momentum_norm, &momentum_, nullptr);

    // Rounded up by as much as the rounding of the Gram matrix may have taken away.
    const double bound = std::pow(square_norm(), 0.125) * (1.0 + 1.0 / 512.0);
    const double whole = bound * grad_norm;
    const double cut = whole > kLargest ? kLargest / whole : 1.0;
    const double current = whole * cut;
    const double average = std::sqrt(0.9 * old.norm * old.norm + 0.1 * current * current);
    const double divisor = std::max(average, current);
    const double ratio = divisor > 0.0 ? grad_norm * cut / divisor : divisor;  // NaN stays NaN
    const double erase = rate * ratio * ratio;
    const double erased = write(
        momentum, grad, {retention, old.erasure, cut}, erase * momentum_norm, to, ahead);
    const double share = erase * erased;
    return {static_cast<float>(average),
            static_cast<float>(old.erasure + 0.1 * (share - old.erasure))};
  }

 private:
  // The Gram matrix of the keys on the short side, and the sum of squares of its square.
  double square_norm() {
    const Panels& keys = wide_ ? key_rows_ : key_columns_;
    symmetric_product(keys, keys, {nullptr, &gram_});
    std::vector<double> sums(gram_.panels * (gram_.panels + 1) / 2 * kStrips);
    symmetric_product(
        gram_, gram_, [&](int64_t block, int64_t i, int64_t j, int64_t strip, const Tile& tile) {
          double& sum = sums[block * kStrips + strip / kStrip];
          sum = (i == j ? 1.0 : 2.0) * sum_of_squares(tile);
          if (i == j && strip >= kHalf) sum += sum_of_squares<1>(tile);
        });
    return total(sums);
  }

  // Writes the new momentum and the look-ahead, and returns ‖M Kᵀ K‖ / ‖M‖, for keys and momentum as
  // they are packed.
  // What is erased is smaller than M, but where M is near the largest float its factor is no float.
  // So the factor is applied as two.
  double write(
      const float* momentum, const float* grad, const DeltaShares& shares, double erase, float* to,
      float* ahead) {
    int exponent = 0;
    std::frexp(erase, &exponent);
    // After gradients that faded far, the factor is below all floats: its root must not become
    // zero, by which the rest would be divided. Nothing is erased then, as the rest becomes zero.
    exponent = std::max(exponent, -200);
    const auto root = static_cast<float>(std::ldexp(1.0, exponent / 2));
    const auto rest = static_cast<float>(erase / root);
    if (wide_) {
      const int64_t strips = short_ * short_ * kStrips;
      torch::stable::parallel_for(0, strips, 1, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
          const int64_t block = at / kStrips, strip = at % kStrips * kStrip;
          const int64_t i = block / short_, j = block % short_;
          pack(
              multiply(momentum_.panel(i) + strip, key_rows_.panel(j), momentum_.pairs),
              recalled_.panel(i), strip, j * kPanel);
        }
      });
    }
    const Panels& left = wide_ ? recalled_ : momentum_;
    const Panels& right = wide_ ? key_columns_ : gram_;
    const Rows<float> out{to, m_, n_}, looked{ahead, m_, n_};
    const int64_t blocks = left.panels * right.panels;
    std::vector<double> sums(blocks);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      int64_t taken = first;
      for (int64_t block = first; block < last; ++block) {
        const int64_t j0 = block / (kAhead * left.panels) * kAhead;
        const int64_t width = std::min(kAhead, right.panels - j0);
        const int64_t place = block - j0 * left.panels;
        const int64_t i = place / width, j = j0 + place % width;
        if (block == taken) {
          taken = std::min(last, block + j0 + width - j);
          const int64_t panels = taken - block;
          take_in(momentum, shares.written, grad, i * kPanel, j * kPanel, panels, to);
          take_in(momentum, shares.ahead, grad, i * kPanel, j * kPanel, panels, ahead);
        }
        for (int64_t strip = 0; strip < kPanel; strip += kStrip) {
          const int64_t row = i * kPanel + strip, column = j * kPanel;
          const Tile erased = multiply(left.panel(i) + strip, right.panel(j), left.pairs);
          sums[block] += sum_of_squares(erased);
          const Tile part = scaled(rest, erased);
          out.store(row, column, added(-root, part, out.load(row, column)));
          const float more = root * shares.ahead.erased;
          looked.store(row, column, added(more, part, looked.load(row, column)));
        }
      }
    });
    return std::sqrt(total(sums));
  }

  // Writes the shares of M and G for a panel's rows and some panels of columns. It goes along the
  // rows, which the processor reads ahead; tiles, in the order of the products, it would wait for.
  void take_in(
      const float* momentum, const Shares& shares, const float* grad, int64_t first_row,
      int64_t first_column, int64_t panels, float* to) const {
    const __m512 kept = _mm512_set1_ps(shares.kept), share = _mm512_set1_ps(shares.fresh);
    const int64_t columns = std::min(panels * kPanel, n_ - first_column);
    for (int64_t row = first_row; row < std::min(first_row + kPanel, m_); ++row) {
      for (int64_t column = 0; column < columns; column += 16) {
        const int64_t at = row * n_ + first_column + column;
        const auto mask =
            static_cast<__mmask16>((1u << std::min<int64_t>(columns - column, 16)) - 1);
        const __m512 old = _mm512_mul_ps(kept, _mm512_maskz_loadu_ps(mask, momentum + at));
        const __m512 fresh = _mm512_maskz_loadu_ps(mask, grad + at);
        _mm512_mask_storeu_ps(to + at, mask, _mm512_fmadd_ps(share, fresh, old));
      }
    }
  }

  // The most panels of columns that take in the gradient at a time. They stay in the cache until
  // something is erased from them. A thread with fewer panels takes in those.
  static constexpr int64_t kAhead = 32;

  int64_t m_, n_;
  bool wide_;
  int64_t short_;  // in panels
  Scratch scratch_;
  Panels momentum_, key_rows_, key_columns_;
  Panels gram_, recalled_;
};

}  // namespace

DEEPOPT_AVX512_BF16_END
#endif

namespace {

Tensor newton_schulz(
    Tensor matrices, std::vector<std::vector<double>> coefficients, ScalarType dtype) {
  check(matrices, "matrices");
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
      "newton_schulz multiplies in float32 or bfloat16 here");
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || deepopt::has_bfloat16_products(),
      "newton_schulz has no products in bfloat16 for this processor; take dtype=torch.float32");
  STD_TORCH_CHECK(matrices.dim() >= 2, "matrices must have at least two dimensions");
  std::vector<Coefficients> steps;
  for (const auto& abc : coefficients) {
    STD_TORCH_CHECK(abc.size() == 3, "coefficients must be (a, b, c) of each step");
    steps.push_back(
        {static_cast<float>(abc[0]), static_cast<float>(abc[1]), static_cast<float>(abc[2])});
  }
  const Tensor from = torch::stable::contiguous(matrices);
  Tensor to = torch::stable::empty_like(from);
  if (from.numel() == 0) return to;
  const int64_t rows = from.size(from.dim() - 2), columns = from.size(from.dim() - 1);
  const int64_t size = rows * columns;
  const float* read = from.const_data_ptr<float>();
  float* write = to.mutable_data_ptr<float>();
  if (dtype == ScalarType::Float) {
    deepopt::small::newton_schulz(read, {from.numel() / size, rows, columns}, steps, write);
    return to;
  }
  STD_TORCH_CHECK(!steps.empty(), "coefficients must be those of at least one step");
#ifdef DEEPOPT_AVX512_BF16
  over_batch(from.numel() / size, [&](int64_t first, int64_t last) {
    BFloat16NewtonSchulz work(rows, columns, steps);
    for (int64_t b = first; b < last; ++b) work.run(read + b * size, write + b * size);
  });
#endif
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_write(
    Tensor momentum, Tensor grad, Tensor norm, Tensor erasure, double rate, double retention) {
  check(momentum, "momentum");
  check(grad, "grad");
  check(norm, "norm");
  check(erasure, "erasure");
  STD_TORCH_CHECK(
      momentum.dim() == 3 && grad.dim() == 3 && norm.dim() == 1 && erasure.dim() == 1,
      "momentum and grad must be stacks of matrices, norm and erasure one number for each");
  for (int64_t d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(momentum.size(d) == grad.size(d), "momentum and grad must be of one shape");
  }
  STD_TORCH_CHECK(
      norm.size(0) == grad.size(0) && erasure.size(0) == grad.size(0),
      "norm and erasure must have one number for every matrix");
  const Tensor old = torch::stable::contiguous(momentum), fresh = torch::stable::contiguous(grad);
  const Tensor old_norm = torch::stable::contiguous(norm);
  const Tensor old_erasure = torch::stable::contiguous(erasure);
  Tensor to = torch::stable::empty_like(old), ahead = torch::stable::empty_like(old);
  Tensor new_norm = torch::stable::empty_like(old_norm);
  Tensor new_erasure = torch::stable::empty_like(old_erasure);
  const int64_t rows = old.size(1), columns = old.size(2);
  const auto *m = old.const_data_ptr<float>(), *g = fresh.const_data_ptr<float>();
  const auto *s = old_norm.const_data_ptr<float>(), *e = old_erasure.const_data_ptr<float>();
  auto *new_m = to.mutable_data_ptr<float>(), *new_s = new_norm.mutable_data_ptr<float>();
  auto* new_e = new_erasure.mutable_data_ptr<float>();
  auto* looked = ahead.mutable_data_ptr<float>();
  if (std::min(rows, columns) < kShortest || !deepopt::has_bfloat16_products()) {
    deepopt::small::delta_write(
        {m, s, e}, g, {old.size(0), rows, columns}, rate, retention, {new_m, new_s, new_e},
        looked);
    return {to, new_norm, new_erasure, ahead};
  }
#ifdef DEEPOPT_AVX512_BF16
  const int64_t size = rows * columns;
  over_batch(old.size(0), [&](int64_t first, int64_t last) {
    BFloat16DeltaWrite work(rows, columns);
    for (int64_t b = first; b < last; ++b) {
      const auto average = work.run(
          m + b * size, g + b * size, {s[b], e[b]}, retention, rate, new_m + b * size,
          looked + b * size);
      new_s[b] = average.norm;
      new_e[b] = average.erasure;
    }
  });
#endif
  return {to, new_norm, new_erasure, ahead};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("newton_schulz", TORCH_BOX(&newton_schulz));
  m.impl("delta_write", TORCH_BOX(&delta_write));
}
