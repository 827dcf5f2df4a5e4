// deepopt::multi_scale_write on the CPU.
#include "multi_scale.h"

namespace deepopt {
namespace {

DEEPOPT_CLONES void advance(const MultiScale::Factors& factors, std::array<const float*, 3> from,
                            std::array<float*, 3> to, int64_t begin, int64_t end) {
  const float *momentum = from[0], *slow = from[1], *grad = from[2];
  float *new_momentum = to[0], *new_slow = to[1], *ahead = to[2];
  const MultiScale::Factors f = factors;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    float fast = momentum[i], whole = slow[i], next = grad[i];
    MultiScale::next(f, fast, whole, next);
    new_momentum[i] = fast;
    new_slow[i] = whole;
    ahead[i] = next;
  }
}

std::tuple<Tensor, Tensor, Tensor> multi_scale_write(Tensor momentum, Tensor slow, Tensor grad,
                                                     Tensor step, double retention,
                                                     int64_t slow_chunk, double beta3) {
  MultiScaleTensors of(momentum, slow, grad, step);
  const MultiScale rule{retention, beta3, slow_chunk};
  const auto from = of.from();
  const auto to = of.to();
  const float* steps = of.step.const_data_ptr<float>();
  for_pieces(of.batch, of.entries, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
    const int64_t first = b * of.entries;
    advance(rule.factors(steps[b]), from, to, first + begin, first + end);
  });
  return of.results();
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("multi_scale_write", TORCH_BOX(&deepopt::multi_scale_write));
}
