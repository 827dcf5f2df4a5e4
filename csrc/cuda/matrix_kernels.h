// Operators on stacks of matrices on CUDA: what they ask of the kernels. Everything is float32
// unless a kind says otherwise.
#pragma once
#include "../rules/coordinate_mlp.h"
#include "../rules/horizons.h"
#include "../rules/multi_scale.h"
#include "../rules/scale_update.h"
#include "tables.h"

namespace deepopt::cuda {

// A stack (B, m, n) that lies row after row or column after column.
struct Stack {
  const void* data;
  Kind kind;
  bool transposed;
};

struct Shape {
  int64_t batch, rows, columns;
};

// The terms of a sum. Further launches add what is beyond kMost to the result.
struct Terms {
  static constexpr int kMost = 8;
  Stack stacks[kMost];
  const float* coefficients[kMost];  // one for each matrix, or for each row
  int count = 0;
  bool by_row, onto;  // onto: add to what the result holds
};

void combine(float* result, const Terms& terms, const Shape& shape, void* stream);

// Entries of a matrix that a block sums up.
constexpr int64_t kSummed = 1 << 15;
DEEPOPT_RULE int64_t parts_of(int64_t entries, int64_t each) { return (entries + each - 1) / each; }

// partial: batch x parts_of(entries, kSummed).
void frobenius(float* norms, double* partial, const float* x, int64_t batch, int64_t entries,
               void* stream);

// The products of x alone, or of x and y; the result has shape (1 or 3, B, m). A stack without
// columns has no address, and its products are zero.
void row_products(float* result, const float* x, const float* y, bool two, bool transposed,
                  const Shape& shape, void* stream);

// Runs the rule, whose products and norms have been measured.
void scale_update(const ScaleUpdate& rule, void* stream);

void multi_scale_write(const MultiScale& rule, void* stream);

// partial: batch x parts_of(entries, kSummed) x sums of the rule; shares: batch.
void horizons_write(const Horizons& rule, double* partial, Horizons::Shares* shares, void* stream);

constexpr int kMlpEntries = 1024;  // of a block: four for each thread

void coordinate_mlp(float* result, const CoordinateMlp& mlp, void* stream);

// partial: batch x numbers of a matrix x parts_of(entries, kMlpEntries).
void coordinate_mlp_gradient(float* gradient, double* partial, const CoordinateMlp& mlp,
                             const float* target, const float* unit, void* stream);

}  // namespace deepopt::cuda
