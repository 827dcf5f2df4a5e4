#include "../rules/sums.h"

#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

// The order of all additions follows from the shapes alone; there are no atomics.

// Norms take two rounds. Each block sums up a part of a matrix, then one block the parts of each
// matrix.
__global__ void __launch_bounds__(kThreads)
    sum_squares(double* partial, const float* x, int64_t entries, int64_t parts) {
  __shared__ double scratch[kThreads / kWarp];
  const int64_t b = blockIdx.x / parts, begin = blockIdx.x % parts * kSummed;
  const int64_t left = entries - begin;
  const int count = left < kSummed ? int(left) : int(kSummed);
  const float* from = x + b * entries + begin;
  double sum = 0;
  in_packs<4>(count, on_16_bytes(from), int(threadIdx.x), kThreads, [&](auto width, int i) {
    const auto pack = load<width.value>(from + i);
#pragma unroll
    for (int k = 0; k < width.value; ++k) sum += product(pack.x[k], pack.x[k]);
  });
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    norms_of_parts(float* norms, const double* partial, int64_t parts) {
  __shared__ double scratch[kThreads / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) sum += partial[blockIdx.x * parts + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) norms[blockIdx.x] = norm_of(sum);
}

constexpr int kRows = kThreads / kWarp;  // of a block: a warp for each

template <bool kTwo>
__device__ __forceinline__ void add_products(double (&sums)[3], float a, float b) {
  sums[0] += product(a, a);
  if constexpr (kTwo) {
    sums[1] += product(a, b);
    sums[2] += product(b, b);
  }
}

template <bool kTwo>
__global__ void __launch_bounds__(kThreads)
    products_of_rows(float* result, const float* x, const float* y, int64_t rows, int64_t columns) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;  // a whole warp
  const int lane = int(threadIdx.x) % kWarp;
  const float *a = x + row * columns, *b = (kTwo ? y : x) + row * columns;
  double sums[3] = {};
  in_packs<4>(columns, on_16_bytes(a, b), lane, kWarp, [&](auto width, int64_t i) {
    const auto as = load<width.value>(a + i), bs = kTwo ? load<width.value>(b + i) : as;
#pragma unroll
    for (int k = 0; k < width.value; ++k) add_products<kTwo>(sums, as.x[k], bs.x[k]);
  });
#pragma unroll
  for (int p = 0; p < (kTwo ? 3 : 1); ++p) {
    const double sum = warp_sum(sums[p]);
    if (lane == 0) result[p * rows + row] = float(sum);
  }
}

// For stacks that lie column after column: eight threads share the columns of each row.
template <bool kTwo>
__global__ void __launch_bounds__(kThreads)
    products_of_columns(float* result, const float* x, const float* y, Shape shape) {
  __shared__ double scratch[3][kRows][kWarp];
  const int64_t m = shape.rows, n = shape.columns, strips = parts_of(m, kWarp);
  const int64_t b = blockIdx.x / strips, i = blockIdx.x % strips * kWarp + threadIdx.x;
  double sums[3] = {};
  if (i < m) {
    for (int64_t j = threadIdx.y; j < n; j += kRows) {
      const int64_t at = (b * n + j) * m + i;
      add_products<kTwo>(sums, x[at], kTwo ? y[at] : 0.0f);
    }
  }
#pragma unroll
  for (int p = 0; p < (kTwo ? 3 : 1); ++p) scratch[p][threadIdx.y][threadIdx.x] = sums[p];
  __syncthreads();
  if (threadIdx.y || i >= m) return;
#pragma unroll
  for (int p = 0; p < (kTwo ? 3 : 1); ++p) {
    double sum = 0;
    for (int k = 0; k < kRows; ++k) sum += scratch[p][k][threadIdx.x];
    result[(p * shape.batch + b) * m + i] = float(sum);
  }
}

}  // namespace

void frobenius(float* norms, double* partial, const float* x, int64_t batch, int64_t entries,
               void* stream) {
  const int64_t parts = parts_of(entries, kSummed);
  launch(sum_squares, batch * parts, kThreads, stream, partial, x, entries, parts);
  launch(norms_of_parts, batch, kThreads, stream, norms, partial, parts);
}

void row_products(float* result, const float* x, const float* y, bool two, bool transposed,
                  const Shape& shape, void* stream) {
  const int64_t rows = shape.batch * shape.rows;
  if (transposed) {
    const int64_t blocks = shape.batch * parts_of(shape.rows, kWarp);
    launch(two ? products_of_columns<true> : products_of_columns<false>, blocks, dim3(kWarp, kRows),
           stream, result, x, y, shape);
  } else {
    launch(two ? products_of_rows<true> : products_of_rows<false>, parts_of(rows, kRows), kThreads,
           stream, result, x, y, rows, shape.columns);
  }
}

}  // namespace deepopt::cuda
