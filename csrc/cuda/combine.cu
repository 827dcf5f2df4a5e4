#include "../rules/combine.h"

#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

constexpr int kSide = 32;  // side of a square that is transposed
constexpr int kDown = 8;   // rows of the square that a block takes at once

template <int V>
__device__ __forceinline__ void read(float (&x)[V], const Stack& from, int64_t at) {
  if (from.kind == Kind::f32) {
    const auto pack = load<V>(static_cast<const float*>(from.data) + at);
    for (int k = 0; k < V; ++k) x[k] = pack.x[k];
  } else if (from.kind == Kind::bf16) {
    const auto pack = load<V>(static_cast<const bf16*>(from.data) + at);
    for (int k = 0; k < V; ++k) x[k] = widened(pack.x[k]);
  } else {
    const auto pack = load<V>(static_cast<const fp16*>(from.data) + at);
    for (int k = 0; k < V; ++k) x[k] = widened(pack.x[k]);
  }
}

template <int V>
__device__ __forceinline__ void add(float (&sum)[V], float c, const float (&x)[V], bool first) {
  for (int k = 0; k < V; ++k) sum[k] = first ? weighed(c, x[k]) : weighed_onto(sum[k], c, x[k]);
}

// Computes V entries of the result, which share a coefficient, from K terms; K = 0 takes any
// number.
template <int K, int V>
__device__ __forceinline__ void combined(float* result, const Terms& terms, int64_t at,
                                         int64_t row) {
  float sum[V];
  if (terms.onto) {
    read<V>(sum, Stack{result, Kind::f32, false}, at);
  }
  if constexpr (K) {  // all float32: every load is issued before the first is waited for
    Pack<float, V> x[K];
#pragma unroll
    for (int t = 0; t < K; ++t) x[t] = load<V>(static_cast<const float*>(terms.stacks[t].data) + at);
#pragma unroll
    for (int t = 0; t < K; ++t) add(sum, terms.coefficients[t][row], x[t].x, t == 0);
  } else {
    for (int t = 0; t < terms.count; ++t) {
      float x[V];
      read<V>(x, terms.stacks[t], at);
      add(sum, terms.coefficients[t][row], x, t == 0 && !terms.onto);
    }
  }
  Pack<float, V> out;
  for (int k = 0; k < V; ++k) out.x[k] = sum[k];
  store(result + at, out);
}

// All stacks lie row after row. Each run of `length` entries shares a coefficient; a thread takes
// words of V entries.
template <int K, int V>
__global__ void __launch_bounds__(kThreads)
    combine_straight(float* result, const __grid_constant__ Terms terms, int64_t words,
                     int64_t length) {
  const int64_t begin = int64_t(blockIdx.x) * (kChunkEntries / 4);
  const int64_t left = words - begin;
  const int count = left < kChunkEntries / 4 ? int(left) : kChunkEntries / 4;
  const int64_t row = begin * V / length, along = begin * V % length;
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    // From the chunk's first row on; 32 bits divide many times faster than 64.
    const int64_t beyond = along + int64_t(i) * V;
    const int64_t rows = length >> 31 ? beyond >= length : uint32_t(beyond) / uint32_t(length);
    combined<K, V>(result, terms, (begin + i) * V, row + rows);
  }
}

// Some stacks lie column after column: squares of them are transposed in shared memory.
__global__ void __launch_bounds__(kSide* kDown)
    combine_turned(float* result, const __grid_constant__ Terms terms, Shape shape) {
  __shared__ float square[kSide][kSide + 1];
  const int64_t m = shape.rows, n = shape.columns;
  const int64_t across = parts_of(n, kSide), down = parts_of(m, kSide);
  const int64_t b = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int64_t i0 = tile / across * kSide, j0 = tile % across * kSide;
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  float sum[kSide / kDown][1];
  for (int t = 0; t < terms.count; ++t) {
    const Stack& from = terms.stacks[t];
    float entry[1];
    if (from.transposed) {
      __syncthreads();
      for (int k = 0; k < kSide; k += kDown) {
        if (i0 + x < m && j0 + y + k < n) {
          read<1>(entry, from, (b * n + j0 + y + k) * m + i0 + x);
          square[y + k][x] = entry[0];
        }
      }
      __syncthreads();
    }
    for (int k = 0; k < kSide; k += kDown) {
      const int64_t i = i0 + y + k, j = j0 + x;
      if (i >= m || j >= n) continue;
      const int64_t row = b * m + i, at = row * n + j;
      if (t == 0 && terms.onto) sum[k / kDown][0] = result[at];
      if (from.transposed) {
        entry[0] = square[x][y + k];
      } else {
        read<1>(entry, from, at);
      }
      const float c = terms.coefficients[t][terms.by_row ? row : b];
      add(sum[k / kDown], c, entry, t == 0 && !terms.onto);
    }
  }
  for (int k = 0; k < kSide; k += kDown) {
    const int64_t i = i0 + y + k, j = j0 + x;
    if (i < m && j < n) result[(b * m + i) * n + j] = sum[k / kDown][0];
  }
}

template <int K, int V>
void straight(float* result, const Terms& terms, int64_t entries, int64_t length, void* stream) {
  launch(combine_straight<K, V>, parts_of(entries / V, kChunkEntries / 4), kThreads, stream, result,
         terms, entries / V, length);
}

}  // namespace

void combine(float* result, const Terms& terms, const Shape& shape, void* stream) {
  const int64_t entries = shape.batch * shape.rows * shape.columns;
  const int64_t length = shape.columns * (terms.by_row ? 1 : shape.rows);
  bool turned = false, floats = !terms.onto, by_four = length % 4 == 0;
  for (int t = 0; t < terms.count; ++t) {
    const Stack& from = terms.stacks[t];
    turned = turned || from.transposed;
    floats = floats && from.kind == Kind::f32;
    by_four = by_four && reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  }
  if (turned) {
    const int64_t tiles = parts_of(shape.rows, kSide) * parts_of(shape.columns, kSide);
    launch(combine_turned, shape.batch * tiles, dim3(kSide, kDown), stream, result, terms, shape);
  } else if (!by_four) {
    straight<0, 1>(result, terms, entries, length, stream);
  } else if (floats && terms.count == 1) {
    straight<1, 4>(result, terms, entries, length, stream);
  } else if (floats && terms.count == 2) {
    straight<2, 4>(result, terms, entries, length, stream);
  } else if (floats && terms.count == 3) {
    straight<3, 4>(result, terms, entries, length, stream);
  } else {
    straight<0, 4>(result, terms, entries, length, stream);
  }
}

}  // namespace deepopt::cuda
