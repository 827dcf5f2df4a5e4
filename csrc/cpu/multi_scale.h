// What the launchers of deepopt::multi_scale_write, on the CPU and on CUDA, are given and return.
#pragma once
#include <tuple>

#include "../rules/multi_scale.h"
#include "matrices.h"

namespace deepopt {

struct __attribute__((visibility("hidden"))) MultiScaleTensors {  // as torch's Tensor is
  int64_t batch, entries;  // of a matrix
  Tensor momentum, slow, grad, step;  // contiguous
  std::array<Tensor, 3> next;  // momentum, slow, look-ahead

  MultiScaleTensors(const Tensor& momentum, const Tensor& slow, const Tensor& grad,
                    const Tensor& step)
      : momentum(torch::stable::contiguous(momentum)),
        slow(torch::stable::contiguous(slow)),
        grad(torch::stable::contiguous(grad)),
        step(torch::stable::contiguous(step)) {
    STD_TORCH_CHECK(momentum.dim() == 3 && step.dim() == 1 && step.size(0) == momentum.size(0),
                    "deepopt::multi_scale_write: matrices must be of shape (B, m, n), steps (B,)");
    for (const Tensor* one : {&momentum, &slow, &grad, &step}) {
      STD_TORCH_CHECK(one->scalar_type() == ScalarType::Float && one->device() == momentum.device(),
                      "deepopt::multi_scale_write: tensors must be float32, on one device");
      if (one != &step) check_same_shape(*one, momentum);
    }
    batch = momentum.size(0);
    entries = momentum.size(1) * momentum.size(2);
    for (Tensor& made : next) made = torch::stable::empty_like(this->momentum);
  }

  std::array<const float*, 3> from() const {
    return {momentum.const_data_ptr<float>(), slow.const_data_ptr<float>(),
            grad.const_data_ptr<float>()};
  }
  std::array<float*, 3> to() {
    return {next[0].mutable_data_ptr<float>(), next[1].mutable_data_ptr<float>(),
            next[2].mutable_data_ptr<float>()};
  }
  std::tuple<Tensor, Tensor, Tensor> results() const { return {next[0], next[1], next[2]}; }
};

}  // namespace deepopt
