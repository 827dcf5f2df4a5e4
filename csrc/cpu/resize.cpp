// deepopt::resize on the CPU: the operators that measure and multiply, and a rule between them.
#include "resize.h"

#include "operators.h"

namespace deepopt {
namespace {

struct Alone {  // the rows of a matrix, one after the other
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  double sum(double x) const { return x; }
};

std::vector<Tensor> resize(std::vector<Tensor> updates, std::optional<Tensor> weight,
                           Tensor momentum, Tensor grad, Tensor step,
                           std::optional<Tensor> grad_norm, std::optional<Tensor> row_moment,
                           std::optional<Tensor> row_weight, double beta1, double beta2,
                           double rms_cap, std::optional<double> update_rms) {
  ResizeTensors of(updates, weight, grad_norm, row_moment, row_weight, beta1, beta2, rms_cap,
                   update_rms);
  Resize& rule = of.rule;
  rule.products = of.read(row_products(updates), rule.rows * (weight ? 3 : 1));
  if (grad_norm) {
    rule.gradient = of.read(frobenius(grad));
    rule.momentum = of.read(frobenius(momentum));
    rule.step = of.read(step);
  }
  const int64_t grain = std::max<int64_t>(1, kChunk / 8 / std::max<int64_t>(1, rule.rows));
  torch::stable::parallel_for(0, rule.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rule(b, Alone{});
  });
  return of.results(combine(updates, of.factors));
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("resize", TORCH_BOX(&deepopt::resize)); }
