// deepopt::multi_scale_write on the CPU.
#include "../common/multi_scale_arguments.h"

#include "../common/matrices.h"

namespace deepopt {
namespace {

DEEPOPT_CLONES void take_in(const MultiScale& rule, const MultiScale::Factors& factors,
                            int64_t begin, int64_t end) {
  const float *momentum = rule.momentum, *slow = rule.slow, *grad = rule.grad;
  float *new_momentum = rule.new_momentum, *new_slow = rule.new_slow, *ahead = rule.ahead;
  const MultiScale::Factors f = factors;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    float m = momentum[i], s = slow[i], g = grad[i];
    MultiScale::take_in(f, m, s, g);
    new_momentum[i] = m;
    new_slow[i] = s;
    ahead[i] = g;
  }
}

std::tuple<Tensor, Tensor, Tensor> multi_scale_write(Tensor momentum, Tensor slow, Tensor grad,
                                                     Tensor step, double retention,
                                                     int64_t slow_chunk, double beta3) {
  const MultiScaleArguments given(momentum, slow, grad, step, retention, slow_chunk, beta3);
  const MultiScale& rule = given.rule;
  for_pieces(rule.batch, rule.entries, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
    const int64_t first = b * rule.entries;
    take_in(rule, rule.factors(b), first + begin, first + end);
  });
  return given.results();
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("multi_scale_write", TORCH_BOX(&deepopt::multi_scale_write));
}
