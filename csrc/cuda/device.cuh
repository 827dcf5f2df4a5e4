// What all kernels share: the narrow types, vectors of entries, sums over threads, and the launch.
// No torch here, so that a file of kernels compiles for all devices within a second or two.
#pragma once
#if defined(DEEPOPT_EMULATED)
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstdint>
#include <type_traits>

#include "../rules/rule.h"
#include "tables.h"

namespace deepopt {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;  // threads of a warp

#if !defined(DEEPOPT_EMULATED)
using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, dim3 threads, void* stream, const Args&... args) {
  if (blocks) kernel<<<unsigned(blocks), threads, 0, cudaStream_t(stream)>>>(args...);
}
#endif

// Named functions, because torch builds with the types' own conversions switched off.
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(fp16 x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, bf16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, fp16& to) { to = __float2half_rn(x); }

// Entries that one thread loads and stores at once, 16 bytes at a time.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T x[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <class... T>
DEEPOPT_RULE bool on_16_bytes(const T*... at) {
  return ((reinterpret_cast<uintptr_t>(at) | ...) & 15) == 0;
}

// One thread's share of `count` entries: V at a time where every tensor is `aligned` to 16 bytes,
// and what is left one at a time. `use` gets how many it takes, as a type, and the first of them.
template <int V, class Index, class Use>
__device__ __forceinline__ void in_packs(Index count, bool aligned, int thread, int threads,
                                         const Use& use) {
  Index done = 0;
  if (aligned) {
    done = count / V * V;
    for (Index i = thread * V; i < done; i += threads * V) {
      use(std::integral_constant<int, V>(), i);
    }
  }
  for (Index i = done + thread; i < count; i += threads) use(std::integral_constant<int, 1>(), i);
}

// The sum over a warp, in every thread of it. The additions are always paired in the same way.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int away = kWarp / 2; away; away /= 2) x += __shfl_xor_sync(kAll, x, away);
  return x;
}

// The sum over a block of kThreads, in every thread of it. `scratch` is shared memory for this sum
// alone.
template <class T>
__device__ __forceinline__ T block_sum(T x, T (&scratch)[kThreads / kWarp]) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += scratch[w];
  return sum;
}

// A block's share of a table: a tensor and a stretch of its entries.
struct Piece {
  int tensor;
  int64_t begin;
  int count;
};

template <int N, class Own>
__device__ __forceinline__ Piece piece_of(const Table<N, Own>& table, unsigned block) {
  int low = 0, high = table.tensors - 1;  // the last tensor whose first chunk is not beyond
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t(block - table.first[low]) * kChunkEntries;
  const int64_t left = table.entries[low] - begin;
  return {low, begin, left < kChunkEntries ? int(left) : kChunkEntries};
}

// The addresses of entry `index` in N tensors that are walked by strides.
template <int N, class Own>
__device__ __forceinline__ void places_of(const Strided<N, Own>& table, int64_t index,
                                          char* (&at)[N]) {
  for (int k = 0; k < N; ++k) at[k] = table.at[k];
  for (int d = table.dims; d-- > 0;) {
    const int64_t along = index % table.size[d];
    index /= table.size[d];
    for (int k = 0; k < N; ++k) at[k] += along * table.stride[d][k];
  }
}

}  // namespace deepopt
