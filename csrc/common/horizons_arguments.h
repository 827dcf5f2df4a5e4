// The arguments and results of deepopt::horizons_write, for the launchers on the CPU and on CUDA.
#pragma once
#include "../rules/horizons.h"
#include "float_arrays.h"

namespace deepopt {

struct DEEPOPT_HIDDEN HorizonsArguments {
  Horizons rule{};

  HorizonsArguments(const std::vector<Tensor>& averages, const Tensor& grad,
                    const Tensor& foresight, const Tensor& grad_size, const Tensor& phi,
                    const Tensor& step, const std::vector<double>& retentions)
      : arrays_(grad,
                "deepopt::horizons_write: tensors must be float32 on one device: the averages and "
                "grad of shape (B, m, n), foresight (B, averages), grad_size and step (B,), phi "
                "(B, units, 3 averages + 2)") {
    const auto scales = int64_t(averages.size());
    STD_TORCH_CHECK(scales > 0 && scales <= Horizons::kMostScales,
                    "deepopt::horizons_write: there must be 1 to 8 averages");
    STD_TORCH_CHECK(retentions.size() == averages.size(),
                    "deepopt::horizons_write: there must be one retention for each average");
    STD_TORCH_CHECK(grad.dim() == 3 && phi.dim() == 3,
                    "deepopt::horizons_write: grad must be of shape (B, m, n), phi of shape "
                    "(B, units, 3 averages + 2)");
    const int64_t b = grad.size(0), m = grad.size(1), n = grad.size(2), units = phi.size(1);
    rule.scales = int(scales), rule.units = int(units);
    rule.batch = b, rule.entries = m * n;
    rule.grad = arrays_.read(grad, {b, m, n});
    rule.foresight = arrays_.read(foresight, {b, scales});
    rule.grad_size = arrays_.read(grad_size, {b});
    rule.phi = arrays_.read(phi, {b, units, 3 * scales + 2});
    rule.step = arrays_.read(step, {b});
    for (int k = 0; k < rule.scales; ++k) {
      rule.retentions[k] = retentions[k];
      rule.averages[k] = arrays_.read(averages[k], {b, m, n});
    }
    for (int k = 0; k < rule.scales; ++k) rule.new_averages[k] = arrays_.make({b, m, n});
    rule.new_foresight = arrays_.make({b, scales});
    rule.new_grad_size = arrays_.make({b});
    rule.weights = arrays_.make({b, scales - 1});
    rule.read = arrays_.make({b, m, n});
  }

  // In the order in which the operator returns them.
  const std::vector<Tensor>& results() const { return arrays_.results(); }

 private:
  FloatArrays arrays_;
};

}  // namespace deepopt
