// deepopt::scale_update and deepopt::orthogonal_update on the CPU: operators that measure and
// multiply, and the rule between them.
#include "../common/scale_update_arguments.h"

#include "operators.h"

namespace deepopt {
namespace {

struct OneThread {  // takes the rows of a matrix one after the other
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  double sum(double x) const { return x; }
};

// Fills in what the rule measures, and calls it for every matrix.
void measure(ScaleUpdateTensors& made, const std::vector<Tensor>& updates,
             const ScaleArguments& given) {
  ScaleUpdate& rule = made.rule;
  rule.products = made.read(row_products(updates), rule.rows * (rule.weight ? 3 : 1));
  if (rule.grad_norm) {
    rule.gradient = made.read(frobenius(given.grad));
    rule.momentum = made.read(frobenius(given.momentum));
    rule.step = made.read(given.step);
  }
  const int64_t grain = std::max<int64_t>(1, kWorth / 8 / std::max<int64_t>(1, rule.rows));
  torch::stable::parallel_for(0, rule.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) rule(b, OneThread{});
  });
}

std::vector<Tensor> scale_update(const std::vector<Tensor>& updates, const ScaleArguments& given) {
  ScaleUpdateTensors made(updates, given);
  measure(made, updates, given);
  return made.results(combine(updates, made.factors));
}

// Called through the dispatcher, so that a profile of the step shows its matrix products as an
// operator of their own.
Tensor newton_schulz(const Tensor& matrices, const std::vector<std::vector<double>>& coefficients,
                     ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(matrices), from(coefficients), from(dtype)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("deepopt::newton_schulz", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::vector<Tensor> orthogonal_update(const std::vector<std::vector<double>>& coefficients,
                                      ScalarType dtype, const std::optional<Tensor>& second,
                                      const ScaleArguments& given) {
  std::vector<Tensor> updates{newton_schulz(given.momentum, coefficients, dtype)};
  if (second) updates.push_back(*second);
  ScaleUpdateTensors made(updates, given);
  measure(made, updates, given);
  combine_into(updates[0], updates, made.factors);
  return made.results(updates[0]);
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  using namespace deepopt;
  m.impl("scale_update", &boxed<&scale_update, std::vector<Tensor>, ScaleArguments>);
  m.impl("orthogonal_update", &boxed<&orthogonal_update, std::vector<std::vector<double>>,
                                     ScalarType, std::optional<Tensor>, ScaleArguments>);
}
