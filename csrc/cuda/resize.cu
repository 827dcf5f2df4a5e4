#include "../rules/resize.h"

#include "device.cuh"
#include "matrices.h"

namespace deepopt::cuda {
namespace {

struct Block {  // the rows of a matrix, dealt out to its threads
  double (&scratch)[kThreads / kWarp];

  __device__ __forceinline__ int64_t first() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t step() const { return kThreads; }
  __device__ __forceinline__ double sum(double x) const {
    __syncthreads();  // the sum before this one has been read
    return block_sum(x, scratch);
  }
};

__global__ void __launch_bounds__(kThreads) resize_matrix(const __grid_constant__ Resize rule) {
  __shared__ double scratch[kThreads / kWarp];
  rule(blockIdx.x, Block{scratch});
}

}  // namespace

void resize(const Resize& rule, void* stream) {
  launch(resize_matrix, rule.batch, kThreads, stream, rule);
}

}  // namespace deepopt::cuda
