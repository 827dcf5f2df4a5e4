#include "../rules/horizons.h"

#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

// The order of all additions follows from the shapes alone; there are no atomics.

// A block sums up kSummed entries of one matrix, the gradient's with each average in turn.
__global__ void __launch_bounds__(kThreads)
    sum_products(double* partial, const __grid_constant__ Horizons rule) {
  __shared__ double scratch[3][kThreads / kWarp];
  const int64_t parts = parts_of(rule.entries, kSummed);
  const int64_t b = blockIdx.x / parts, begin = blockIdx.x % parts * kSummed;
  const int64_t left = rule.entries - begin, first = b * rule.entries + begin;
  const int count = left < kSummed ? int(left) : int(kSummed), K = rule.scales;
  const float* g = rule.grad + first;
  double* part = partial + blockIdx.x * rule.sums();
  for (int k = 0; k < K; ++k) {
    const float* m = rule.averages[k] + first;
    double sums[3] = {};
    in_packs<4>(count, on_16_bytes(g, m), int(threadIdx.x), kThreads, [&](auto width, int i) {
      const auto gs = load<width.value>(g + i), ms = load<width.value>(m + i);
#pragma unroll
      for (int v = 0; v < width.value; ++v) {
        sums[0] += product(gs.x[v], gs.x[v]);
        sums[1] += product(gs.x[v], ms.x[v]);
        sums[2] += product(ms.x[v], ms.x[v]);
      }
    });
    __syncthreads();  // the last round's sums have been read
#pragma unroll
    for (int p = 0; p < 3; ++p) sums[p] = block_sum(sums[p], scratch[p]);
    if (threadIdx.x == 0) part[0] = sums[0], part[1 + k] = sums[1], part[1 + K + k] = sums[2];
  }
}

// A block for each matrix: its warps add up the parts, and one thread runs the MLP, which has a few
// units.
__global__ void __launch_bounds__(kThreads)
    mix_horizons(Horizons::Shares* shares, const double* partial,
                 const __grid_constant__ Horizons rule) {
  __shared__ double sum[Horizons::kMostSums];
  const int64_t b = blockIdx.x, parts = parts_of(rule.entries, kSummed);
  const double* part = partial + b * parts * rule.sums();
  const int lane = int(threadIdx.x) % kWarp;
  for (int s = int(threadIdx.x) / kWarp; s < rule.sums(); s += kThreads / kWarp) {
    double own = 0;
    for (int64_t c = lane; c < parts; c += kWarp) own += part[c * rule.sums() + s];
    own = warp_sum(own);
    if (lane == 0) sum[s] = own;
  }
  __syncthreads();
  if (threadIdx.x == 0) shares[b] = rule.mix(b, sum);
}

// A block takes kChunkEntries of one matrix, in words of V.
template <int V>
__global__ void __launch_bounds__(kThreads)
    horizons_words(const Horizons::Shares* shares, const __grid_constant__ Horizons rule) {
  using Word = Pack<float, V>;
  const int64_t parts = parts_of(rule.entries, kChunkEntries);
  const int64_t b = blockIdx.x / parts, begin = blockIdx.x % parts * kChunkEntries;
  const int64_t left = rule.entries - begin, first = b * rule.entries + begin;
  const int words = (left < kChunkEntries ? int(left) : kChunkEntries) / V;
  const Horizons::Shares& own = shares[b];
  const auto* grad = reinterpret_cast<const Word*>(rule.grad + first);
  auto* read = reinterpret_cast<Word*>(rule.read + first);
  for (int i = int(threadIdx.x); i < words; i += kThreads) {
    const Word g = grad[i];
    Word sum;
    for (int k = 0; k < rule.scales; ++k) {
      const float fresh = rule.fresh(k), share = own.averages[k];
      Word m = reinterpret_cast<const Word*>(rule.averages[k] + first)[i];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum.x[v] = k == 0 ? Horizons::take_first(m.x[v], g.x[v], rule.retention(0), fresh,
                                                 own.ahead, own.grad)
                          : Horizons::take_next(m.x[v], g.x[v], fresh, share, sum.x[v]);
      }
      reinterpret_cast<Word*>(rule.new_averages[k] + first)[i] = m;
    }
    read[i] = sum;
  }
}

}  // namespace

void horizons_write(const Horizons& rule, double* partial, Horizons::Shares* shares, void* stream) {
  const int64_t parts = parts_of(rule.entries, kSummed);
  launch(sum_products, rule.batch * parts, kThreads, stream, partial, rule);
  launch(mix_horizons, rule.batch, kThreads, stream, shares, partial, rule);
  bool by_four = rule.entries % 4 == 0 && on_16_bytes(rule.grad, rule.read);
  for (int k = 0; k < rule.scales; ++k) {
    by_four = by_four && on_16_bytes(rule.averages[k], rule.new_averages[k]);
  }
  const int64_t blocks = rule.batch * parts_of(rule.entries, kChunkEntries);
  launch(by_four ? horizons_words<4> : horizons_words<1>, blocks, kThreads, stream, shares, rule);
}

}  // namespace deepopt::cuda
