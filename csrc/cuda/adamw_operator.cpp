// deepopt::adamw_ on CUDA.
//
// Step counts may be on the host, where they are counted up here and their powers handed over, or
// on the device, where kernels count up and read them: a replayed graph then goes on counting.
#include "../common/adamw_arguments.h"

#include "adamw_kernels.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

// The counts of all parameters, wherever they are.
class Steps {
 public:
  Steps(const AdamWArguments& given, const Device& device) : given_(given) {
    const auto& steps = given.steps;
    on_device_ = !steps.empty() && device.has(steps[0]);
    kind_ = steps.empty() ? Kind::f32 : kind_of(steps[0]);
    for (const Tensor& step : steps) {
      STD_TORCH_CHECK(
          device.has(step) == on_device_ && kind_of(step) == kind_,
          "deepopt::adamw_: steps must be float32 or float64, all alike, and all on the "
          "CPU or on the parameters' device");
    }
  }

  bool on_device() const { return on_device_; }
  Kind kind() const { return kind_; }

  void* at(size_t t) const { return given_.steps[t].mutable_data_ptr(); }

  // Counts up on the host.
  double next(size_t t) const {
    if (kind_ == Kind::f64) return *static_cast<double*>(at(t)) += 1;
    return *static_cast<float*>(at(t)) += 1;
  }

  void count_up(const std::vector<size_t>& which, const Device& device) const {
    Counts counts;
    for (size_t i = 0; i < which.size(); ++i) {
      counts.at[counts.tensors++] = at(which[i]);
      if (counts.tensors == Counts::kMost || i + 1 == which.size()) {
        cuda::count_up(counts, kind_, device.stream());
        counts.tensors = 0;
      }
    }
  }

 private:
  const AdamWArguments& given_;
  bool on_device_;
  Kind kind_;
};

// The parameters whose state is of type S, checked and ready to be stepped.
template <class S>
struct Stepped {
  const AdamWArguments& given;
  std::vector<size_t> which;
  std::vector<Walk<5>> walks;
  std::vector<AtStep<S>> own;
  std::vector<Dtypes> dtypes;

  Stepped(const AdamWArguments& arguments, const Steps& steps, ScalarType state)
      : given(arguments), which(arguments.with_state(state)) {
    const Roundings roundings = given.roundings();
    walks.reserve(which.size());
    for (size_t t : which) {
      const Kind param = kind_of(given.params[t]), grad = kind_of(given.grads[t]);
      STD_TORCH_CHECK(grad == param || (grad == Kind::f32 && param != Kind::f64),
                      "deepopt::adamw_: a gradient must have the dtype of its parameter or state");
      given.add_walk(walks, t);
      own.push_back({0, 0, steps.on_device() ? steps.at(t) : nullptr, roundings.noise(t).key});
      dtypes.push_back({param, grad, roundings.of(t)});
    }
  }

  void run(const Steps& steps, const Device& device) {
    const Decay decay{given.lr, given.beta1, given.beta2, steps.kind()};
    AdamW<S> rule = given.rule<S>();
    if (steps.on_device()) {
      steps.count_up(which, device);
    } else {
      for (size_t i = 0; i < which.size(); ++i) {
        rule.at_step(given.lr, given.beta1, given.beta2, steps.next(which[i]));
        own[i].step_size = rule.step_size, own[i].root_correction = rule.root_correction;
      }
    }
    in_tables<5>(walks, own, dtypes, [&](const auto& table, const Dtypes& of) {
      adamw(table, rule, decay, of.param, of.other, of.rounding, device.stream());
    });
    device.check_launch();
  }
};

void on_adamw(const AdamWArguments& given) {
  if (given.params.empty()) return;
  const Device device(given.params[0]);
  for (const auto* tensors :
       {&given.params, &given.grads, &given.exp_avgs, &given.exp_avg_sqs, &given.lows}) {
    for (const Tensor& tensor : *tensors) {
      STD_TORCH_CHECK(device.has(tensor), "deepopt::adamw_: tensors must be on one device");
    }
  }
  given.check();
  const Steps steps(given, device);
  // Both are checked before either changes anything.
  Stepped<float> narrow(given, steps, ScalarType::Float);
  Stepped<double> wide(given, steps, ScalarType::Double);
  narrow.run(steps, device);
  wide.run(steps, device);
}

}  // namespace
}  // namespace deepopt::cuda

DEEPOPT_CUDA_LIBRARY {
  m.impl("adamw_", &deepopt::boxed<&deepopt::cuda::on_adamw, deepopt::AdamWArguments>);
}
