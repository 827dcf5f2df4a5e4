// What the launchers of deepopt::resize, on the CPU and on CUDA, are given and return.
#pragma once
#include <optional>

#include "../rules/resize.h"
#include "multi_tensor.h"

namespace deepopt {

struct __attribute__((visibility("hidden"))) ResizeTensors {  // as torch's Tensor is
  Resize rule{};
  Tensor factors;              // of the updates, row by row or one for each matrix
  std::vector<Tensor> states;  // the new ones

  ResizeTensors(const std::vector<Tensor>& updates, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& gain, const std::optional<Tensor>& grad_norm,
                const std::optional<Tensor>& row_moment, const std::optional<Tensor>& row_weight,
                double beta1, double beta2, double rms_cap,
                const std::optional<double>& update_rms)
      : like_(updates.empty() ? Tensor() : updates[0]) {
    STD_TORCH_CHECK(updates.size() == (weight ? 2 : 1) && like_.dim() == 3,
                    "deepopt::resize: give one update of shape (B, m, n), or two and the weight of "
                    "the second");
    STD_TORCH_CHECK(grad_norm.has_value() != update_rms.has_value() &&
                        row_moment.has_value() == row_weight.has_value(),
                    "deepopt::resize: give either grad_norm or update_rms, and row_moment and "
                    "row_weight together");
    const int64_t batch = like_.size(0), rows = like_.size(1), count = int64_t(updates.size());
    rule.batch = batch, rule.rows = rows, rule.columns = like_.size(2);
    rule.beta1 = beta1, rule.beta2 = beta2, rule.rms_cap = rms_cap;
    if (weight) rule.weight = read(*weight);
    if (gain) rule.gain = read(*gain);
    if (grad_norm) {
      rule.grad_norm = read(*grad_norm);
      rule.new_grad_norm = state({batch});
    } else {
      rule.update_rms = *update_rms;
    }
    if (row_moment) {
      rule.row_moment = read(*row_moment, rows);
      rule.row_weight = read(*row_weight, rows);
      rule.new_row_moment = state({batch, rows});
      rule.new_row_weight = state({batch, rows});
      factors = made({count, batch, rows});
    } else {
      factors = made({count, batch});
    }
    rule.factors = factors.mutable_data_ptr<float>();
  }

  // What the rule reads, so many numbers for each matrix; it is kept for as long as this is.
  const float* read(const Tensor& tensor, int64_t each = 1) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float &&
                        tensor.numel() == rule.batch * each &&
                        tensor.device() == like_.device(),
                    "deepopt::resize: weight and state must be float32, of the updates' matrices "
                    "and rows, and on their device");
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr<float>();
  }

  std::vector<Tensor> results(Tensor update) {
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
