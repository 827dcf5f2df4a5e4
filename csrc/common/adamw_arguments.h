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

  // The checks of everything but shapes and strides, which add_walk() checks.
  void check() const {
    roundings().check();
    const size_t count = params.size();
    STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count &&
                        exp_avg_sqs.size() == count && steps.size() == count,
                    "deepopt::adamw_: the lists must have one tensor for each parameter");
    for (size_t t = 0; t < count; ++t) {
      const ScalarType state = state_dtype(t);
      STD_TORCH_CHECK(exp_avgs[t].scalar_type() == state && exp_avg_sqs[t].scalar_type() == state,
                      "deepopt::adamw_: state must be float32, or float64 for float64 parameters");
    }
    for (const Tensor& step : steps) {
      STD_TORCH_CHECK(
          step.numel() == 1 &&
              (step.scalar_type() == ScalarType::Float || step.scalar_type() == ScalarType::Double),
          "deepopt::adamw_: steps must be one float32 or float64 number for each parameter");
    }
  }

  // Adds the walk through parameter t's tensors: parameter, gradient, m, v and low bits.
  void add_walk(std::vector<Walk<5>>& walks, size_t t) const {
    const std::array<View, 5> views{View(params[t]), View(grads[t]), View(exp_avgs[t]),
                                    View(exp_avg_sqs[t]), View(roundings().low(t))};
    for (const View& view : views) check_same_shape(view, views[0]);
    for (size_t written : {0, 2, 3, 4}) check_written(views[written]);
    walks.emplace_back(views);
  }

 private:
  ScalarType state_dtype(size_t t) const {
    const bool wide = params[t].scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
  }
};

}  // namespace deepopt
