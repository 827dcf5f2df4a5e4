#include "../rules/scale_update.h"

#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

struct Block {  // the team of threads that shares the rows of a matrix
  double (&scratch)[kThreads / kWarp];

  __device__ __forceinline__ int64_t first() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t step() const { return kThreads; }
  __device__ __forceinline__ double sum(double x) const {
    __syncthreads();  // the sum before this one has been read
    return block_sum(x, scratch);
  }
};

__global__ void __launch_bounds__(kThreads)
    scale_update_matrix(const __grid_constant__ ScaleUpdate rule) {
  __shared__ double scratch[kThreads / kWarp];
  rule(blockIdx.x, Block{scratch});
}

}  // namespace

void scale_update(const ScaleUpdate& rule, void* stream) {
  launch(scale_update_matrix, rule.batch, kThreads, stream, rule);
}

}  // namespace deepopt::cuda
