#include "../rules/multi_scale.h"

#include "device.cuh"
#include "matrices.h"

namespace deepopt::cuda {
namespace {

// A block has a chunk of one matrix; in words of V entries.
template <int V>
__global__ void __launch_bounds__(kThreads)
    multi_scale_words(const __grid_constant__ MultiScaleArrays of) {
  using Word = Pack<float, V>;
  const int64_t parts = parts_of(of.entries, kChunkEntries);
  const int64_t b = blockIdx.x / parts, begin = blockIdx.x % parts * kChunkEntries;
  const int64_t left = of.entries - begin, first = b * of.entries + begin;
  const int words = (left < kChunkEntries ? int(left) : kChunkEntries) / V;
  const auto factors = of.rule.factors(of.step[b]);
  // As words from here on: by pointers to floats, nvcc would store one by one.
  const auto *momentum = reinterpret_cast<const Word*>(of.from[0] + first),
             *slow = reinterpret_cast<const Word*>(of.from[1] + first),
             *grad = reinterpret_cast<const Word*>(of.from[2] + first);
  auto *next_momentum = reinterpret_cast<Word*>(of.to[0] + first),
       *next_slow = reinterpret_cast<Word*>(of.to[1] + first),
       *ahead = reinterpret_cast<Word*>(of.to[2] + first);
  for (int i = int(threadIdx.x); i < words; i += kThreads) {
    Word m = momentum[i], s = slow[i], g = grad[i];
    for (int k = 0; k < V; ++k) MultiScale::next(factors, m.x[k], s.x[k], g.x[k]);
    next_momentum[i] = m;
    next_slow[i] = s;
    ahead[i] = g;
  }
}

}  // namespace

void multi_scale_write(const MultiScaleArrays& of, void* stream) {
  const bool by_four = of.entries % 4 == 0 && on_16_bytes(of.from[0], of.from[1], of.from[2]) &&
                       on_16_bytes(of.to[0], of.to[1], of.to[2]);
  const int64_t blocks = of.batch * parts_of(of.entries, kChunkEntries);
  launch(by_four ? multi_scale_words<4> : multi_scale_words<1>, blocks, kThreads, stream, of);
}

}  // namespace deepopt::cuda
