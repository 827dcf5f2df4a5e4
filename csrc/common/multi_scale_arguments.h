// The arguments and results of deepopt::multi_scale_write, for the launchers on the CPU and on
// CUDA.
#pragma once
#include <tuple>

#include "../rules/multi_scale.h"
#include "float_arrays.h"

namespace deepopt {

struct DEEPOPT_HIDDEN MultiScaleArguments {
  MultiScale rule{};

  MultiScaleArguments(const Tensor& momentum, const Tensor& slow, const Tensor& grad,
                      const Tensor& step, double retention, int64_t slow_chunk, double beta3)
      : arrays_(momentum,
                "deepopt::multi_scale_write: momentum, slow and grad must be float32, of one shape "
                "(B, m, n), step of shape (B,), all on one device") {
    STD_TORCH_CHECK(momentum.dim() == 3,
                    "deepopt::multi_scale_write: momentum must be of shape (B, m, n)");
    const auto sizes = momentum.sizes();
    rule.retention = retention, rule.beta3 = beta3, rule.slow_chunk = slow_chunk;
    rule.batch = sizes[0], rule.entries = sizes[1] * sizes[2];
    rule.momentum = arrays_.read(momentum, sizes);
    rule.slow = arrays_.read(slow, sizes);
    rule.grad = arrays_.read(grad, sizes);
    rule.step = arrays_.read(step, sizes.slice(0, 1));
    for (float** made : {&rule.new_momentum, &rule.new_slow, &rule.ahead}) {
      *made = arrays_.make(sizes);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> results() const {
    const std::vector<Tensor>& all = arrays_.results();
    return {all[0], all[1], all[2]};
  }

 private:
  FloatArrays arrays_;
};

}  // namespace deepopt
