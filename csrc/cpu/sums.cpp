// deepopt::frobenius and deepopt::row_products on the CPU.
#include "../rules/sums.h"

#include "../common/matrix_arguments.h"
#include "operators.h"

namespace deepopt {
namespace {

// A sum runs in a fixed number of lanes, whatever the processor's registers hold. The order of the
// additions, and with it the result, is then the same on every machine and for any number of
// threads.
constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline __attribute__((always_inline)) void load(const float* x, Lanes& wide) {
  Floats floats;
  memcpy(&floats, x, sizeof floats);
  wide = __builtin_convertvector(floats, Lanes);
}

// The sum of the four accumulators that a loop fills in turn, and of the rest that it left over.
inline __attribute__((always_inline)) double total(const Lanes (&sums)[4], double rest) {
  const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum + rest;
}

DEEPOPT_CLONES double squares(const float* x, int64_t count) {
  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      Lanes wide;
      load(x + i + u * kLanes, wide);
      sums[u] += wide * wide;
    }
  }
  double rest = 0;
  for (; i < count; ++i) rest += product(x[i], x[i]);
  return total(sums, rest);
}

}  // namespace

// With the bits of squares(x) in the first of the sums.
DEEPOPT_CLONES void products(const float* x, const float* y, int64_t count, double* out) {
  Lanes xx[4] = {}, xy[4] = {}, yy[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      Lanes a, b;
      load(x + i + u * kLanes, a);
      load(y + i + u * kLanes, b);
      xx[u] += a * a;
      xy[u] += a * b;
      yy[u] += b * b;
    }
  }
  double rest[3] = {};
  for (; i < count; ++i) {
    rest[0] += product(x[i], x[i]);
    rest[1] += product(x[i], y[i]);
    rest[2] += product(y[i], y[i]);
  }
  out[0] = total(xx, rest[0]);
  out[1] = total(xy, rest[1]);
  out[2] = total(yy, rest[2]);
}

namespace {

constexpr int64_t kColumns = 512;  // columns whose sums stay in the nearest cache
constexpr int64_t kDeep = 8;       // entries of each column that are added in registers

// Adds the products of `deep` rows, `stride` apart, to the sums of their columns.
DEEPOPT_CLONES void add_products(const float* x, const float* y, int64_t stride, int64_t deep,
                                 int64_t count, double* sums) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Lanes sum;
    memcpy(&sum, sums + i, sizeof sum);
    for (int64_t j = 0; j < deep; ++j) {
      Lanes a, b;
      load(x + j * stride + i, a);
      load(y + j * stride + i, b);
      sum += a * b;
    }
    memcpy(sums + i, &sum, sizeof sum);
  }
  for (; i < count; ++i) {
    for (int64_t j = 0; j < deep; ++j) sums[i] += product(x[j * stride + i], y[j * stride + i]);
  }
}

}  // namespace

Tensor frobenius(Tensor matrices) {
  const Matrices x = frobenius_argument(matrices);
  Tensor norms = torch::stable::empty({x.batch}, ScalarType::Float);
  const auto* data = static_cast<const float*>(x.data());
  const int64_t each = chunks_of(x.entries());
  std::vector<double> partial(x.batch * each);
  for_pieces(x.batch, x.entries(), [&](int64_t b, int64_t begin, int64_t end, int64_t c) {
    partial[c] = squares(data + b * x.entries() + begin, end - begin);
  });
  float* to = norms.mutable_data_ptr<float>();
  for (int64_t b = 0; b < x.batch; ++b) {
    double sum = 0;
    for (int64_t c = 0; c < each; ++c) sum += partial[b * each + c];
    to[b] = norm_of(sum);
  }
  return norms;
}

Tensor row_products(std::vector<Tensor> tensors) {
  const RowProductsArguments given(tensors);
  const Matrices &x = given.x, &y = given.y;
  const bool two = given.two;
  const int64_t pairs = two ? 3 : 1, m = x.rows, n = x.columns, rows = x.batch * m;
  Tensor result = torch::stable::empty({pairs, x.batch, m}, ScalarType::Float);
  float* to = result.mutable_data_ptr<float>();
  const auto* a = static_cast<const float*>(x.data());
  const auto* b = static_cast<const float*>(y.data());
  if (!x.transposed) {
    const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, n));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        double sums[3];
        if (two) {
          products(a + r * n, b + r * n, n, sums);
        } else {
          sums[0] = squares(a + r * n, n);
        }
        for (int64_t p = 0; p < pairs; ++p) to[p * rows + r] = float(sums[p]);
      }
    });
    return result;
  }
  const int64_t strips = (m + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, x.batch * strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(3 * kColumns);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t matrix = c / strips, from = c % strips * kColumns;
      const int64_t count = std::min(kColumns, m - from);
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t j = 0; j < n; j += kDeep) {
        const int64_t at = (matrix * n + j) * m + from, deep = std::min(kDeep, n - j);
        add_products(a + at, a + at, m, deep, count, sums.data());
        if (!two) continue;
        add_products(a + at, b + at, m, deep, count, sums.data() + kColumns);
        add_products(b + at, b + at, m, deep, count, sums.data() + 2 * kColumns);
      }
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t i = 0; i < count; ++i) {
          to[p * rows + matrix * m + from + i] = float(sums[p * kColumns + i]);
        }
      }
    }
  });
  return result;
}

}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("frobenius", TORCH_BOX(&deepopt::frobenius));
  m.impl("row_products", TORCH_BOX(&deepopt::row_products));
}
