#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

constexpr int kEach = kMlpEntries / kThreads;  // entries of a thread, kThreads apart
constexpr int kUnits = 64;                     // units whose weights shared memory holds at once
constexpr int kWarps = kThreads / kWarp;

// The entries of a block: a stretch of matrix b. Threads beyond the matrix's end hold zeros.
template <int F>
struct Entries {
  float x[kEach][F];
  float base[kEach];
  float value[kEach];
  int64_t b, at[kEach];
  bool inside[kEach];

  __device__ __forceinline__ Entries(const CoordinateMlp& mlp) {
    const int64_t parts = parts_of(mlp.entries, kMlpEntries);
    b = blockIdx.x / parts;
    const int64_t begin = blockIdx.x % parts * kMlpEntries;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t i = begin + e * kThreads + threadIdx.x;
      inside[e] = i < mlp.entries;
      at[e] = b * mlp.entries + i;
      base[e] = inside[e] ? mlp.base[at[e]] : 0.0f;
      value[e] = 0.0f;
#pragma unroll
      for (int f = 0; f < F; ++f) {
        x[e][f] = inside[e] ? mlp.features[f][at[e]] * mlp.scales[b * F + f] : 0.0f;
      }
    }
  }

  // The weighted sum of the units, in their order.
  __device__ __forceinline__ void forward(const CoordinateMlp& mlp,
                                          float (&weights)[kUnits * (F + 1)]) {
    for (int first = 0; first < mlp.units; first += kUnits) {
      const int units = share(mlp, first, weights);
      for (int k = 0; k < units; ++k) {
        const float* w = weights + k * (F + 1);
#pragma unroll
        for (int e = 0; e < kEach; ++e) value[e] = fma_(w[F], unit_value<F>(w, x[e]), value[e]);
      }
    }
  }

  // Brings the weights of up to kUnits units into shared memory, and says of how many.
  __device__ __forceinline__ int share(const CoordinateMlp& mlp, int first,
                                       float (&weights)[kUnits * (F + 1)]) const {
    const int units = mlp.units - first < kUnits ? mlp.units - first : kUnits;
    const float* from = mlp.weights + (b * mlp.units + first) * (F + 1);
    __syncthreads();
    for (int i = int(threadIdx.x); i < units * (F + 1); i += kThreads) weights[i] = from[i];
    __syncthreads();
    return units;
  }
};

template <int F>
__global__ void __launch_bounds__(kThreads)
    mlp_forward(float* result, const __grid_constant__ CoordinateMlp mlp) {
  __shared__ float weights[kUnits * (F + 1)];
  Entries<F> entries(mlp);
  entries.forward(mlp, weights);
  const Correction rule{mlp.reach[entries.b], 0, 0};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (entries.inside[e]) result[entries.at[e]] = rule.result(entries.base[e], entries.value[e]);
  }
}

// The tanh of every unit is computed twice, before and after the slope is known. Keeping it would
// take more registers, or more memory traffic, than computing it again costs.
template <int F>
__global__ void __launch_bounds__(kThreads)
    mlp_gradient(double* partial, const __grid_constant__ CoordinateMlp mlp, const float* target,
                 const float* unit) {
  __shared__ float weights[kUnits * (F + 1)];
  __shared__ float sums[kWarps][kUnits * (F + 1)];
  Entries<F> entries(mlp);
  entries.forward(mlp, weights);
  const float reach = mlp.reach[entries.b], of = unit[entries.b];
  const Correction rule{reach, 1 / of, reach / of / float(mlp.entries)};
  float slope[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    slope[e] = entries.inside[e]
                   ? rule.slope(entries.base[e], entries.value[e], target[entries.at[e]])
                   : 0.0f;
  }
  const int64_t parts = parts_of(mlp.entries, kMlpEntries), part = blockIdx.x % parts;
  const int64_t numbers = int64_t(mlp.units) * (F + 1);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  for (int first = 0; first < mlp.units; first += kUnits) {
    const int units = entries.share(mlp, first, weights);
    for (int k = 0; k < units; ++k) {
      const float* w = weights + k * (F + 1);
      float own[F + 1] = {};
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float a = unit_value<F>(w, entries.x[e]);
        const float below = slope[e] - slope[e] * a * a;
#pragma unroll
        for (int f = 0; f < F; ++f) own[f] = fma_(below, entries.x[e][f], own[f]);
        own[F] = fma_(slope[e], a, own[F]);
      }
#pragma unroll
      for (int f = 0; f <= F; ++f) {
        const float sum = warp_sum(own[f]);
        if (lane == 0) sums[warp][k * (F + 1) + f] = sum;
      }
    }
    __syncthreads();
    for (int s = int(threadIdx.x); s < units * (F + 1); s += kThreads) {
      double sum = 0;
      for (int v = 0; v < kWarps; ++v) sum += double(sums[v][s]);
      partial[(entries.b * numbers + first * (F + 1) + s) * parts + part] = sum;
    }
  }
}

// One block sums up one number of the gradient.
__global__ void __launch_bounds__(kThreads)
    mlp_gradient_of_parts(float* gradient, const double* partial, const float* weights, int width,
                          int64_t parts) {
  __shared__ double scratch[kThreads / kWarp];
  const int64_t s = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) sum += partial[s * parts + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x) return;
  const int64_t readout = s / width * width + width - 1;
  gradient[s] = float(s == readout ? sum : sum * double(weights[readout]));
}

template <int F>
void forward(float* result, const CoordinateMlp& mlp, void* stream) {
  launch(mlp_forward<F>, mlp.batch * parts_of(mlp.entries, kMlpEntries), kThreads, stream, result,
         mlp);
}

template <int F>
void gradients(double* partial, const CoordinateMlp& mlp, const float* target, const float* unit,
               void* stream) {
  launch(mlp_gradient<F>, mlp.batch * parts_of(mlp.entries, kMlpEntries), kThreads, stream, partial,
         mlp, target, unit);
}

}  // namespace

void coordinate_mlp(float* result, const CoordinateMlp& mlp, void* stream) {
  constexpr decltype(&forward<1>) kernels[] = {forward<1>, forward<2>, forward<3>, forward<4>};
  kernels[mlp.count - 1](result, mlp, stream);
}

void coordinate_mlp_gradient(float* gradient, double* partial, const CoordinateMlp& mlp,
                             const float* target, const float* unit, void* stream) {
  constexpr decltype(&gradients<1>) kernels[] = {gradients<1>, gradients<2>, gradients<3>,
                                                 gradients<4>};
  kernels[mlp.count - 1](partial, mlp, target, unit, stream);
  const int width = mlp.count + 1;
  launch(mlp_gradient_of_parts, mlp.batch * mlp.units * width, kThreads, stream, gradient, partial,
         mlp.weights, width, parts_of(mlp.entries, kMlpEntries));
}

}  // namespace deepopt::cuda
