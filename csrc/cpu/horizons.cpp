// deepopt::horizons_write on the CPU: one pass measures, one writes.
#include "../common/horizons_arguments.h"

#include "../common/matrices.h"
#include "operators.h"

namespace deepopt {
namespace {

DEEPOPT_CLONES void take_first(const float* average, const float* grad, float retention,
                               float fresh, float ahead, float share, float* new_average,
                               float* read, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    float m = average[i];
    read[i] = Horizons::take_first(m, grad[i], retention, fresh, ahead, share);
    new_average[i] = m;
  }
}

DEEPOPT_CLONES void take_next(const float* average, const float* grad, float fresh, float share,
                              float* new_average, float* read, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    float m = average[i];
    read[i] = Horizons::take_next(m, grad[i], fresh, share, read[i]);
    new_average[i] = m;
  }
}

std::vector<Tensor> horizons_write(std::vector<Tensor> averages, Tensor grad, Tensor foresight,
                                   Tensor grad_size, Tensor phi, Tensor step,
                                   std::vector<double> retentions) {
  const HorizonsArguments given(averages, grad, foresight, grad_size, phi, step, retentions);
  const Horizons& rule = given.rule;
  const int K = rule.scales, sums = rule.sums();
  const int64_t each = chunks_of(rule.entries);

  std::vector<double> parts(rule.batch * each * sums);
  for_pieces(rule.batch, rule.entries, [&](int64_t b, int64_t begin, int64_t end, int64_t c) {
    const int64_t first = b * rule.entries + begin;
    double* part = parts.data() + c * sums;
    for (int k = 0; k < K; ++k) {
      double of_pair[3];
      products(rule.grad + first, rule.averages[k] + first, end - begin, of_pair);
      part[0] = of_pair[0], part[1 + k] = of_pair[1], part[1 + K + k] = of_pair[2];
    }
  });

  std::vector<Horizons::Shares> shares(rule.batch);
  for (int64_t b = 0; b < rule.batch; ++b) {
    double sum[Horizons::kMostSums] = {};
    for (int64_t c = b * each; c < (b + 1) * each; ++c) {
      for (int s = 0; s < sums; ++s) sum[s] += parts[c * sums + s];
    }
    shares[b] = rule.mix(b, sum);
  }

  for_pieces(rule.batch, rule.entries, [&](int64_t b, int64_t begin, int64_t end, int64_t) {
    const int64_t first = b * rule.entries + begin, count = end - begin;
    const float* g = rule.grad + first;
    float* read = rule.read + first;
    const Horizons::Shares& own = shares[b];
    take_first(rule.averages[0] + first, g, rule.retention(0), rule.fresh(0), own.ahead, own.grad,
               rule.new_averages[0] + first, read, count);
    for (int k = 1; k < K; ++k) {
      take_next(rule.averages[k] + first, g, rule.fresh(k), own.averages[k],
                rule.new_averages[k] + first, read, count);
    }
  });
  return given.results();
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("horizons_write", TORCH_BOX(&deepopt::horizons_write));
}
