#include "../rules/multi_scale.h"

#include "device.cuh"
#include "matrix_kernels.h"

namespace deepopt::cuda {
namespace {

// A block takes kChunkEntries of one matrix, in words of V.
template <int V>
__global__ void __launch_bounds__(kThreads)
    multi_scale_words(const __grid_constant__ MultiScale rule) {
  using Word = Pack<float, V>;
  const int64_t parts = parts_of(rule.entries, kChunkEntries);
  const int64_t b = blockIdx.x / parts, begin = blockIdx.x % parts * kChunkEntries;
  const int64_t left = rule.entries - begin, first = b * rule.entries + begin;
  const int words = (left < kChunkEntries ? int(left) : kChunkEntries) / V;
  const auto factors = rule.factors(b);
  // Pointers to words from here on: through pointers to floats nvcc would store them one by one.
  const auto *momentum = reinterpret_cast<const Word*>(rule.momentum + first),
             *slow = reinterpret_cast<const Word*>(rule.slow + first),
             *grad = reinterpret_cast<const Word*>(rule.grad + first);
  auto *new_momentum = reinterpret_cast<Word*>(rule.new_momentum + first),
       *new_slow = reinterpret_cast<Word*>(rule.new_slow + first),
       *ahead = reinterpret_cast<Word*>(rule.ahead + first);
  for (int i = int(threadIdx.x); i < words; i += kThreads) {
    Word m = momentum[i], s = slow[i], g = grad[i];
    for (int k = 0; k < V; ++k) MultiScale::take_in(factors, m.x[k], s.x[k], g.x[k]);
    new_momentum[i] = m;
    new_slow[i] = s;
    ahead[i] = g;
  }
}

}  // namespace

void multi_scale_write(const MultiScale& rule, void* stream) {
  const bool by_four = rule.entries % 4 == 0 &&
                       on_16_bytes(rule.momentum, rule.slow, rule.grad) &&
                       on_16_bytes(rule.new_momentum, rule.new_slow, rule.ahead);
  const int64_t blocks = rule.batch * parts_of(rule.entries, kChunkEntries);
  launch(by_four ? multi_scale_words<4> : multi_scale_words<1>, blocks, kThreads, stream, rule);
}

}  // namespace deepopt::cuda
