// The arguments and results of deepopt::multi_scale_write, for the launchers on the CPU and on
// CUDA.
#pragma once
#include <tuple>

#include "../rules/multi_scale.h"
#include "multi_tensor.h"

namespace deepopt {

struct DEEPOPT_HIDDEN MultiScaleArguments {
  MultiScale rule{};

  MultiScaleArguments(const Tensor& momentum, const Tensor& slow, const Tensor& grad,
                      const Tensor& step, double retention, int64_t slow_chunk, double beta3)
      : like_(torch::stable::contiguous(momentum)) {
    STD_TORCH_CHECK(like_.dim() == 3,
                    "deepopt::multi_scale_write: momentum must be of shape (B, m, n)");
    rule.retention = retention, rule.beta3 = beta3, rule.slow_chunk = slow_chunk;
    rule.batch = like_.size(0), rule.entries = like_.size(1) * like_.size(2);
    rule.momentum = read(like_, like_.sizes());
    rule.slow = read(slow, like_.sizes());
    rule.grad = read(grad, like_.sizes());
    rule.step = read(step, like_.sizes().slice(0, 1));
    for (float** made : {&rule.new_momentum, &rule.new_slow, &rule.ahead}) {
      made_.push_back(torch::stable::empty_like(like_));
      *made = made_.back().mutable_data_ptr<float>();
    }
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {made_[0], made_[1], made_[2]}; }

 private:
  Tensor like_;
  std::vector<Tensor> kept_, made_;

  const float* read(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    const auto own = tensor.sizes();
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float &&
                        tensor.device() == like_.device() &&
                        std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()),
                    "deepopt::multi_scale_write: momentum, slow and grad must be float32, of one "
                    "shape (B, m, n), step of shape (B,), all on one device");
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr<float>();
  }
};

}  // namespace deepopt
