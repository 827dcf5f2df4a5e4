// What deepopt::scale_update and deepopt::orthogonal_update, on the CPU and on CUDA, are given
// beside the updates, and how the rule's arrays and the results are made of it.
#pragma once
#include <optional>

#include "../rules/scale_update.h"
#include "boxed.h"
#include "multi_tensor.h"

namespace deepopt {

// ScaleArguments of deepopt/ops/orthogonal_update.py, where the members are explained.
struct DEEPOPT_HIDDEN ScaleArguments {
  Tensor momentum, grad, step;
  double beta1, beta2, rms_cap;
  std::optional<double> update_rms;
  std::optional<Tensor> grad_norm, row_moment, row_weight, weight;

  void take_from(BoxedCall& call) {
    call.take(momentum, grad, step, beta1, beta2, rms_cap, update_rms, grad_norm, row_moment,
              row_weight, weight);
  }
};

// The rule with all of its arrays but those that a launcher measures: products and norms.
struct DEEPOPT_HIDDEN ScaleUpdateTensors {
  ScaleUpdate rule{};
  Tensor factors;              // one for each update and matrix, or for each of its rows
  std::vector<Tensor> states;  // the new ones

  ScaleUpdateTensors(const std::vector<Tensor>& updates, const ScaleArguments& given)
      : like_(updates.empty() ? Tensor() : updates[0]) {
    STD_TORCH_CHECK(
        updates.size() == (given.weight ? 2 : 1) && like_.dim() == 3,
        "deepopt::scale_update: give one update of shape (B, m, n), or two and the weight "
        "of the second");
    STD_TORCH_CHECK(
        given.grad_norm.has_value() != given.update_rms.has_value() &&
            given.row_moment.has_value() == given.row_weight.has_value(),
        "deepopt::scale_update: give either grad_norm or update_rms, and row_moment and "
        "row_weight together");
    const int64_t batch = like_.size(0), rows = like_.size(1), count = int64_t(updates.size());
    rule.batch = batch, rule.rows = rows, rule.columns = like_.size(2);
    rule.beta1 = given.beta1, rule.beta2 = given.beta2, rule.rms_cap = given.rms_cap;
    if (given.weight) rule.weight = read(*given.weight);
    if (given.grad_norm) {
      rule.grad_norm = read(*given.grad_norm);
      rule.new_grad_norm = state({batch});
    } else {
      rule.update_rms = *given.update_rms;
    }
    if (given.row_moment) {
      rule.row_moment = read(*given.row_moment, rows);
      rule.row_weight = read(*given.row_weight, rows);
      rule.new_row_moment = state({batch, rows});
      rule.new_row_weight = state({batch, rows});
      factors = made({count, batch, rows});
    } else {
      factors = made({count, batch});
    }
    rule.factors = factors.mutable_data_ptr<float>();
  }

  // The address of so many numbers for each matrix, which stay alive for as long as this struct.
  const float* read(const Tensor& tensor, int64_t each = 1) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float &&
                        tensor.numel() == rule.batch * each && tensor.device() == like_.device(),
                    "deepopt::scale_update: weight and state must be float32, of the updates' "
                    "matrices and rows, and on their device");
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr<float>();
  }

  std::vector<Tensor> results(Tensor update) const {
    std::vector<Tensor> all{std::move(update)};
    all.insert(all.end(), states.begin(), states.end());
    return all;
  }

 private:
  Tensor like_;
  std::vector<Tensor> kept_;

  Tensor made(std::initializer_list<int64_t> sizes) const {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, like_.device());
  }
  float* state(std::initializer_list<int64_t> sizes) {
    states.push_back(made(sizes));
    return states.back().mutable_data_ptr<float>();
  }
};

}  // namespace deepopt
