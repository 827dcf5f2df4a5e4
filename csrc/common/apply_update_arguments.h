// The arguments of deepopt::apply_update_, and the checks that the launchers for CPU and CUDA
// share.
#pragma once
#include "../rules/apply_update.h"
#include "boxed.h"
#include "roundings.h"

namespace deepopt {

struct DEEPOPT_HIDDEN ApplyUpdateArguments {
  std::vector<Tensor> params, updates, lows;
  std::vector<int64_t> seeds;
  double lr, weight_decay;

  void take_from(BoxedCall& call) { call.take(params, updates, lows, seeds, lr, weight_decay); }

  Roundings roundings() const { return {params, lows, seeds}; }

  template <class S>
  ApplyUpdate<S> rule() const {
    return ApplyUpdate<S>(lr, weight_decay);
  }

  void check() const {
    roundings().check();
    STD_TORCH_CHECK(updates.size() == params.size(),
                    "deepopt::apply_update_: give one update for each parameter");
    for (size_t t = 0; t < params.size(); ++t) {
      const bool wide = params[t].scalar_type() == ScalarType::Double;
      STD_TORCH_CHECK(
          updates[t].scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
          "deepopt::apply_update_: updates must be float32, or float64 for float64 parameters");
    }
  }

  // Adds the walk through parameter t's tensors: parameter, update and low bits.
  void add_walk(std::vector<Walk<3>>& walks, size_t t) const {
    const std::array<View, 3> views{View(params[t]), View(updates[t]), View(roundings().low(t))};
    for (const View& view : views) check_same_shape(view, views[0]);
    for (size_t written : {0, 2}) check_written(views[written]);
    walks.emplace_back(views);
  }
};

}  // namespace deepopt
