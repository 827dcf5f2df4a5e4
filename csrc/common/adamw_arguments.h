// The arguments of deepopt::adamw_, and the checks that the launchers for CPU and CUDA share.
#pragma once
#include "../rules/adamw.h"
#include "boxed.h"
#include "roundings.h"

namespace deepopt {

struct DEEPOPT_HIDDEN AdamWArguments {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, steps, lows;
  std::vector<int64_t> seeds;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;

  void take_from(BoxedCall& call) {
    call.take(params, grads, exp_avgs, exp_avg_sqs, steps, lows, seeds, lr, beta1, beta2, eps,
              weight_decay, maximize);
  }

  // One tensor can hold the state of all parameters, which saves handing over one for each.
  bool joined() const { return exp_avgs.size() == 1 && params.size() != 1; }

  Roundings roundings() const { return {params, lows, seeds}; }

  template <class S>
  AdamW<S> rule() const {
    return AdamW<S>(lr, beta1, beta2, eps, weight_decay, maximize);
  }

  // The parameters whose state is float64, or those whose state is float32.
  std::vector<size_t> with_state(ScalarType state) const {
    std::vector<size_t> found;
    for (size_t t = 0; t < params.size(); ++t) {
      if (state_dtype(t) == state) found.push_back(t);
    }
    return found;
  }

  // The first entry of each parameter in joined state, and the number of all entries in the end.
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> all{0};
    for (const Tensor& param : params) all.push_back(all.back() + param.numel());
    return all;
  }

  // Everything that can be said before a tensor is looked into.
  void check() const {
    roundings().check();
    const size_t count = params.size(), states = joined() ? 1 : count;
    STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == states &&
                        exp_avg_sqs.size() == states && steps.size() == states,
                    "deepopt::adamw_: the lists must have one tensor for each parameter");
    for (size_t t = 0; t < count; ++t) {
      const size_t s = joined() ? 0 : t;
      const ScalarType state = state_dtype(t);
      STD_TORCH_CHECK(exp_avgs[s].scalar_type() == state && exp_avg_sqs[s].scalar_type() == state,
                      "deepopt::adamw_: state must be float32, or float64 for float64 parameters");
    }
    for (const Tensor& step : steps) {
      STD_TORCH_CHECK(
          (joined() || step.numel() == 1) &&
              (step.scalar_type() == ScalarType::Float || step.scalar_type() == ScalarType::Double),
          "deepopt::adamw_: steps must be one float32 or float64 number for each parameter");
    }
    if (!joined()) return;
    STD_TORCH_CHECK(
        exp_avgs[0].is_contiguous() && exp_avg_sqs[0].is_contiguous() && steps[0].is_contiguous(),
        "deepopt::adamw_: state in one tensor must be contiguous");
    const int64_t entries = offsets().back();
    STD_TORCH_CHECK(exp_avgs[0].numel() == entries && exp_avg_sqs[0].numel() == entries &&
                        steps[0].numel() == int64_t(count),
                    "deepopt::adamw_: state in one tensor must have the entries of all parameters");
  }

  // Adds the walk through parameter t's tensors: parameter, gradient, m, v and low bits. In joined
  // state the parameter's entries begin at `offset`.
  void add_walk(std::vector<Walk<5>>& walks, size_t t, int64_t offset) const {
    check_written(params[t]);
    check_same_shape(grads[t], params[t]);
    const View param(params[t]), grad(grads[t]), low(roundings().low(t));
    if (joined()) {
      walks.emplace_back(params[t], std::array<View, 5>{param, grad, View(exp_avgs[0], offset),
                                                        View(exp_avg_sqs[0], offset), low});
      return;
    }
    for (const auto* averages : {&exp_avgs, &exp_avg_sqs}) {
      check_written((*averages)[t]);
      check_same_shape((*averages)[t], params[t]);
    }
    walks.emplace_back(
        params[t], std::array<View, 5>{param, grad, View(exp_avgs[t]), View(exp_avg_sqs[t]), low});
  }

 private:
  ScalarType state_dtype(size_t t) const {
    const bool wide = params[t].scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
  }
};

}  // namespace deepopt
