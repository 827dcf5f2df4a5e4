// What deepopt::scale_update and deepopt::orthogonal_update, on the CPU and on CUDA, are given
// beside the updates, and how the rule's arrays and the results are made of it.
#pragma once
#include <optional>

#include "../rules/scale_update.h"
#include "boxed.h"
#include "float_arrays.h"

namespace deepopt {

// ScaleArguments of deepopt/ops/orthogonal_update.py, where the members are explained.
struct DEEPOPT_HIDDEN ScaleArguments {
  Tensor momentum, grad, step;
  double beta1, beta2, rms_cap, rms;
  std::optional<Tensor> grad_norm, row_moment, row_weight, weight;

  void take_from(BoxedCall& call) {
    call.take(momentum, grad, step, beta1, beta2, rms_cap, rms, grad_norm, row_moment, row_weight,
              weight);
  }
};

// The rule with all of its arrays but those that a launcher measures: products and norms.
struct DEEPOPT_HIDDEN ScaleUpdateTensors {
  ScaleUpdate rule{};
  Tensor factors;  // one for each update and matrix, or for each of its rows

  ScaleUpdateTensors(const std::vector<Tensor>& updates, const ScaleArguments& given)
      : arrays_(updates.empty() ? Tensor() : updates[0],
                "deepopt::scale_update: weight and state must be float32, of the updates' matrices "
                "and rows, and on their device") {
    STD_TORCH_CHECK(
        updates.size() == (given.weight ? 2 : 1) && updates[0].dim() == 3,
        "deepopt::scale_update: give one update of shape (B, m, n), or two and the weight "
        "of the second");
    STD_TORCH_CHECK(
        given.row_moment.has_value() == given.row_weight.has_value(),
        "deepopt::scale_update: give row_moment and row_weight together");
    const Tensor& like = updates[0];
    const int64_t batch = like.size(0), rows = like.size(1), count = int64_t(updates.size());
    rule.batch = batch, rule.rows = rows, rule.columns = like.size(2);
    rule.beta1 = given.beta1, rule.beta2 = given.beta2, rule.rms_cap = given.rms_cap;
    rule.rms = given.rms;
    if (given.weight) rule.weight = read(*given.weight);
    if (given.grad_norm) {
      rule.grad_norm = read(*given.grad_norm);
      rule.new_grad_norm = arrays_.make({batch});
    }
    if (given.row_moment) {
      rule.row_moment = read(*given.row_moment, rows);
      rule.row_weight = read(*given.row_weight, rows);
      rule.new_row_moment = arrays_.make({batch, rows});
      rule.new_row_weight = arrays_.make({batch, rows});
      factors = torch::stable::new_empty(like, {count, batch, rows}, ScalarType::Float);
    } else {
      factors = torch::stable::new_empty(like, {count, batch}, ScalarType::Float);
    }
    rule.factors = factors.mutable_data_ptr<float>();
  }

  // The address of so many numbers for each matrix.
  const float* read(const Tensor& tensor, int64_t each = 1) {
    return arrays_.read_count(tensor, rule.batch * each);
  }

  // The update and the new states.
  std::vector<Tensor> results(Tensor update) const {
    std::vector<Tensor> all{std::move(update)};
    all.insert(all.end(), arrays_.results().begin(), arrays_.results().end());
    return all;
  }

 private:
  FloatArrays arrays_;
};

}  // namespace deepopt
