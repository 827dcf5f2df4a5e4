// deepopt::combine on the CPU, tile by tile: a tile of the result stays in the nearest cache while
// all terms are added to it.
#include "../rules/combine.h"

#include "../common/matrix_arguments.h"
#include "operators.h"

namespace deepopt {
namespace {

constexpr int64_t kTile = 2048;   // entries
constexpr int64_t kBlock = 64;    // side of a square that is transposed

// result = c x or result + c x, for entries one after the other.
template <class X, bool kFirst>
inline __attribute__((always_inline)) void term(float* result, float c, const X* x, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    result[i] = kFirst ? weighed(c, float(x[i])) : weighed_onto(result[i], c, float(x[i]));
  }
}

#define TERM(NAME, X)                                                                     \
  DEEPOPT_CLONES void NAME##_first(float* result, float c, const void* x, int64_t count) { \
    term<X, true>(result, c, static_cast<const X*>(x), count);                            \
  }                                                                                       \
  DEEPOPT_CLONES void NAME##_next(float* result, float c, const void* x, int64_t count) {  \
    term<X, false>(result, c, static_cast<const X*>(x), count);                           \
  }
TERM(of_float, float)
TERM(of_bf16, bf16)
TERM(of_fp16, fp16)
#undef TERM

// Sums of two and of three terms in one pass, as most rules need them.
DEEPOPT_CLONES void two_floats(float* result, const float* c, const float* const* x, int64_t count) {
  const float *x0 = x[0], *x1 = x[1], c0 = c[0], c1 = c[1];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) result[i] = weighed_onto(weighed(c0, x0[i]), c1, x1[i]);
}
DEEPOPT_CLONES void three_floats(float* result, const float* c, const float* const* x, int64_t count) {
  const float *x0 = x[0], *x1 = x[1], *x2 = x[2], c0 = c[0], c1 = c[1], c2 = c[2];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    result[i] = weighed_onto(weighed_onto(weighed(c0, x0[i]), c1, x1[i]), c2, x2[i]);
  }
}

// Writes a square of a matrix that lies column after column row after row. It takes eight rows and
// columns at a time in registers, and transposes them in three rounds, which exchange entries that
// are 1, 2 and 4 places apart.
template <class X, class V>
inline __attribute__((always_inline)) void turn(X* to, const X* from, int64_t rows, int64_t columns,
                                                int64_t stride) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      V in[8], by2[8], by4[8];
      for (int k = 0; k < 8; ++k) memcpy(&in[k], from + (j + k) * stride + i, sizeof(V));
      for (int k = 0; k < 8; k += 2) {
        by2[k] = __builtin_shufflevector(in[k], in[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        by2[k + 1] = __builtin_shufflevector(in[k], in[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
      }
      for (int k = 0; k < 8; ++k) {
        if (k & 2) continue;
        by4[k] = __builtin_shufflevector(by2[k], by2[k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        by4[k + 2] = __builtin_shufflevector(by2[k], by2[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
      for (int k = 0; k < 4; ++k) {
        const V low = __builtin_shufflevector(by4[k], by4[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        const V high = __builtin_shufflevector(by4[k], by4[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        memcpy(to + (i + k) * kBlock + j, &low, sizeof low);
        memcpy(to + (i + k + 4) * kBlock + j, &high, sizeof high);
      }
    }
    for (; j < columns; ++j) {
      for (int k = 0; k < 8; ++k) to[(i + k) * kBlock + j] = from[j * stride + i + k];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * kBlock + j] = from[j * stride + i];
  }
}
typedef uint32_t V4 __attribute__((vector_size(32)));
typedef uint16_t V2 __attribute__((vector_size(16)));
DEEPOPT_CLONES void turn4(void* to, const void* from, int64_t rows, int64_t columns, int64_t stride) {
  turn<uint32_t, V4>(static_cast<uint32_t*>(to), static_cast<const uint32_t*>(from), rows, columns, stride);
}
DEEPOPT_CLONES void turn2(void* to, const void* from, int64_t rows, int64_t columns, int64_t stride) {
  turn<uint16_t, V2>(static_cast<uint16_t*>(to), static_cast<const uint16_t*>(from), rows, columns, stride);
}

using Kernel = void (*)(float*, float, const void*, int64_t);

Kernel kernel_for(ScalarType dtype, bool first) {
  if (dtype == ScalarType::Float) return first ? of_float_first : of_float_next;
  if (dtype == ScalarType::BFloat16) return first ? of_bf16_first : of_bf16_next;
  if (dtype == ScalarType::Half) return first ? of_fp16_first : of_fp16_next;
  STD_TORCH_CHECK(false, "deepopt::combine: a tensor's dtype has no kernel");
}

struct Term {
  const Matrices& x;
  const float* coefficients;  // one for each matrix, or for each row
  size_t width;
  Kernel add;

  Term(const Matrices& matrices, const float* c, bool first)
      : x(matrices),
        coefficients(c),
        width(matrices.kept.element_size()),
        add(kernel_for(matrices.kept.scalar_type(), first)) {}
  const char* at(int64_t entry) const { return static_cast<const char*>(x.data()) + entry * width; }
};

// All tensors lie row after row. Each run of `length` entries shares a coefficient.
void straight(float* result, const std::vector<Term>& terms, int64_t rows, int64_t length) {
  const bool floats = std::all_of(terms.begin(), terms.end(),
                                  [](const Term& t) { return t.add == of_float_first || t.add == of_float_next; });
  const auto at_once = !floats              ? nullptr
                       : terms.size() == 2 ? two_floats
                       : terms.size() == 3 ? three_floats
                                           : nullptr;
  const int64_t tile = at_once || terms.size() == 1 ? kChunk : kTile;
  const int64_t tiles = (length + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, kWorth / std::max<int64_t>(1, std::min(length, tile)));
  torch::stable::parallel_for(0, rows * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t row = c / tiles, from = c % tiles * tile;
      const int64_t count = std::min(tile, length - from), at = row * length + from;
      if (at_once) {
        float factors[3];
        const float* x[3];
        for (size_t k = 0; k < terms.size(); ++k) {
          factors[k] = terms[k].coefficients[row];
          x[k] = reinterpret_cast<const float*>(terms[k].at(at));
        }
        at_once(result + at, factors, x, count);
        continue;
      }
      for (const Term& t : terms) {
        t.add(result + at, t.coefficients[row], t.at(at), count);
      }
    }
  });
}

// Some tensors lie column after column. Going square by square reads each line of memory once.
void turned(float* result, const std::vector<Term>& terms, bool by_row) {
  const auto& x = terms[0].x;
  const int64_t m = x.rows, n = x.columns;
  const int64_t down = (m + kBlock - 1) / kBlock, along = (n + kBlock - 1) / kBlock;
  const int64_t grain = kWorth / (kBlock * kBlock);
  torch::stable::parallel_for(0, x.batch * down * along, grain, [&](int64_t begin, int64_t end) {
    alignas(64) char square[kBlock * kBlock * 4];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t b = c / along / down, i0 = c / along % down * kBlock, j0 = c % along * kBlock;
      const int64_t rows = std::min(kBlock, m - i0), columns = std::min(kBlock, n - j0);
      for (const Term& t : terms) {
        if (t.x.transposed) {
          (t.width == 4 ? turn4 : turn2)(square, t.at((b * n + j0) * m + i0), rows, columns, m);
        }
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = b * m + i0 + i, at = row * n + j0;
          const char* from = t.x.transposed ? square + i * kBlock * t.width : t.at(at);
          t.add(result + at, t.coefficients[by_row ? row : b], from, columns);
        }
      }
    }
  });
}

}  // namespace

Tensor combine(std::vector<Tensor> tensors, Tensor coefficients) {
  STD_TORCH_CHECK(!tensors.empty(), "deepopt::combine: there must be at least one tensor");
  Tensor result = torch::stable::empty(tensors[0].sizes(), ScalarType::Float);
  combine_into(result, tensors, coefficients);
  return result;
}

void combine_into(const Tensor& result, const std::vector<Tensor>& tensors,
                  const Tensor& coefficients) {
  const CombineArguments given(tensors, coefficients);
  if (!result.numel()) return;
  std::vector<Term> terms;
  bool same = true;
  for (size_t k = 0; k < tensors.size(); ++k) {
    terms.emplace_back(given.terms[k], given.coefficients(k), k == 0);
    same = same && !given.terms[k].transposed;
  }
  float* to = result.mutable_data_ptr<float>();
  if (same) {
    straight(to, terms, given.rows, result.numel() / given.rows);
  } else {
    turned(to, terms, given.by_row);
  }
}

}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("combine", TORCH_BOX(&deepopt::combine)); }
