// deepopt::resize and deepopt::orthogonal_update on the CPU: the operators that measure and multiply,
// and a rule between them.
#include "resize.h"

#include "operators.h"

namespace deepopt {
namespace {

struct Alone {  // the rows of a matrix, one after the other
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  double sum(double x) const { return x; }
};

// Fills in what the rule measures, and calls it for every matrix.
void measure(ResizeTensors& of, const std::vector<Tensor>& updates, const Tensor& momentum,
             const Tensor& grad, const Tensor& step) {
  Resize& rule = of.rule;
  rule.products = of.read(row_products(updates), rule.rows * (rule.weight ? 3 : 1));
  if (rule.grad_norm) {
    rule.gradient = of.read(frobenius(grad));
    rule.momentum = of.read(frobenius(momentum));
    rule.step = of.read(step);
  }
  const int64_t grain = std::max<int64_t>(1, kWorth / 8 / std::max<int64_t>(1, rule.rows));
  torch::stable::parallel_for(0, rule.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rule(b, Alone{});
  });
}

std::vector<Tensor> resize(std::vector<Tensor> updates, std::optional<Tensor> weight,
                           Tensor momentum, std::optional<Tensor> gain, Tensor grad, Tensor step,
                           std::optional<Tensor> grad_norm, std::optional<Tensor> row_moment,
                           std::optional<Tensor> row_weight, double beta1, double beta2,
                           double rms_cap, std::optional<double> update_rms) {
  ResizeTensors of(updates, weight, gain, grad_norm, row_moment, row_weight, beta1, beta2, rms_cap,
                   update_rms);
  measure(of, updates, momentum, grad, step);
  return of.results(combine(updates, of.factors));
}

// By way of the dispatcher: a profile of the step shows its matrix products apart.
Tensor newton_schulz(const Tensor& matrices, const std::vector<std::vector<double>>& coefficients,
                     ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(matrices), from(coefficients), from(dtype)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("deepopt::newton_schulz", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::vector<Tensor> orthogonal_update(
    Tensor momentum, std::vector<std::vector<double>> coefficients, ScalarType dtype,
    std::optional<Tensor> beside, std::optional<Tensor> weight, std::optional<Tensor> gain,
    Tensor grad, Tensor step, std::optional<Tensor> grad_norm, std::optional<Tensor> row_moment,
    std::optional<Tensor> row_weight, double beta1, double beta2, double rms_cap,
    std::optional<double> update_rms) {
  std::vector<Tensor> updates{newton_schulz(momentum, coefficients, dtype)};
  if (beside) updates.push_back(*beside);
  ResizeTensors of(updates, weight, gain, grad_norm, row_moment, row_weight, beta1, beta2, rms_cap,
                   update_rms);
  measure(of, updates, momentum, grad, step);
  combine_into(updates[0], updates, of.factors);
  return of.results(updates[0]);
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("resize", TORCH_BOX(&deepopt::resize));
  m.impl("orthogonal_update", TORCH_BOX(&deepopt::orthogonal_update));
}
