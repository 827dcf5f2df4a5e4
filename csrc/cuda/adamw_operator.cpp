// deepopt::adamw_ on CUDA.
//
// Step counts may be on the host, where they are counted up here and their powers handed over, or
// on the device, where kernels count up and read them: a replayed graph then goes on counting.
#include "adamw.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

struct Lists {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, steps, lows;
  std::vector<int64_t> seeds;

  // State of all parameters can be one tensor, which spares a handle for each.
  bool joined() const { return exp_avgs.size() == 1 && params.size() != 1; }
};

// The counts of all parameters, wherever they are.
class Steps {
 public:
  Steps(const Lists& lists, const Device& device) : lists_(lists) {
    const auto& steps = lists.steps;
    on_device_ = !steps.empty() && device.has(steps[0]);
    kind_ = steps.empty() ? Kind::f32 : kind_of(steps[0]);
    for (const Tensor& step : steps) {
      STD_TORCH_CHECK(device.has(step) == on_device_ && kind_of(step) == kind_ &&
                          (kind_ == Kind::f32 || kind_ == Kind::f64),
                      "deepopt::adamw_: steps must be float32 or float64, all alike, and all on the "
                      "CPU or on the parameters' device");
    }
  }

  bool on_device() const { return on_device_; }
  Kind kind() const { return kind_; }

  void* at(size_t t) const {
    const bool joined = lists_.joined();
    const Tensor& step = lists_.steps[joined ? 0 : t];
    char* data = static_cast<char*>(step.mutable_data_ptr());
    return data + (joined ? t * step.element_size() : 0);
  }

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
  const Lists& lists_;
  bool on_device_;
  Kind kind_;
};

template <class S>
void run(const Lists& lists, const Steps& steps, const std::vector<size_t>& which,
         const std::vector<int64_t>& offsets, AdamW<S> rule, const Decay& decay,
         const Device& device) {
  const auto& [params, grads, exp_avgs, exp_avg_sqs, _, lows, seeds] = lists;
  const Roundings roundings{params, lows, seeds};
  std::vector<Walk<5>> walks;
  std::vector<AtStep<S>> own;
  std::vector<Dtypes> dtypes;
  walks.reserve(which.size());
  for (size_t t : which) {
    const bool joined = lists.joined();
    check_same_shape(grads[t], params[t]);
    const Kind param = kind_of(params[t]), grad = kind_of(grads[t]);
    STD_TORCH_CHECK(grad == param || (grad == Kind::f32 && param != Kind::f64),
                    "deepopt::adamw_: a gradient must have the dtype of its parameter or state");
    if (!joined) {
      check_same_shape(exp_avgs[t], params[t]);
      check_same_shape(exp_avg_sqs[t], params[t]);
    }
    walks.emplace_back(
        params[t],
        std::array<View, 5>{View(params[t]), View(grads[t]),
                            joined ? View(exp_avgs[0], offsets[t]) : View(exp_avgs[t]),
                            joined ? View(exp_avg_sqs[0], offsets[t]) : View(exp_avg_sqs[t]),
                            View(roundings.low(t))});
    own.push_back({0, 0, steps.on_device() ? steps.at(t) : nullptr, roundings.noise(t).key});
    dtypes.push_back({param, grad, roundings.of(t)});
  }
  // Nothing can go wrong from here on.
  if (steps.on_device()) {
    steps.count_up(which, device);
  } else {
    for (size_t i = 0; i < which.size(); ++i) {
      rule.at_step(decay.lr, decay.beta1, decay.beta2, steps.next(which[i]));
      own[i].step_size = rule.step_size, own[i].root_correction = rule.root_correction;
    }
  }
  in_tables<5>(walks, own, dtypes, [&](const auto& table, const Dtypes& of) {
    adamw(table, rule, decay, of.param, of.other, of.rounding, device.stream());
  });
  device.check_launch();
}

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> lows,
            std::vector<int64_t> seeds, double lr, double beta1, double beta2, double eps,
            double weight_decay, bool maximize) {
  if (params.empty()) return;
  const Device device(params[0]);
  const Lists lists{std::move(params), std::move(grads), std::move(exp_avgs),
                    std::move(exp_avg_sqs), std::move(steps), std::move(lows), std::move(seeds)};
  Roundings{lists.params, lists.lows, lists.seeds}.check();
  const size_t count = lists.params.size(), states = lists.joined() ? 1 : count;
  STD_TORCH_CHECK(lists.grads.size() == count && lists.exp_avgs.size() == states &&
                      lists.exp_avg_sqs.size() == states && lists.steps.size() == states,
                  "deepopt::adamw_: the lists must have one tensor for each parameter");
  for (const auto* tensors : {&lists.params, &lists.grads, &lists.exp_avgs, &lists.exp_avg_sqs,
                              &lists.lows}) {
    for (const Tensor& tensor : *tensors) {
      STD_TORCH_CHECK(device.has(tensor), "deepopt::adamw_: tensors must be on one device");
    }
  }
  const Steps at(lists, device);
  std::vector<size_t> narrow, wide;
  std::vector<int64_t> offsets{0};
  for (size_t t = 0; t < count; ++t) {
    const Kind kind = kind_of(lists.params[t]);
    (kind == Kind::f64 ? wide : narrow).push_back(t);
    offsets.push_back(offsets.back() + lists.params[t].numel());
    const Kind state = kind == Kind::f64 ? kind : Kind::f32;
    const size_t s = lists.joined() ? 0 : t;
    STD_TORCH_CHECK(kind_of(lists.exp_avgs[s]) == state && kind_of(lists.exp_avg_sqs[s]) == state,
                    "deepopt::adamw_: state must be float32, or float64 for float64 parameters");
  }
  if (lists.joined()) {
    STD_TORCH_CHECK(lists.exp_avgs[0].numel() == offsets.back() &&
                        lists.exp_avg_sqs[0].numel() == offsets.back() &&
                        lists.steps[0].numel() == int64_t(count),
                    "deepopt::adamw_: state in one tensor must have the entries of all parameters");
  }
  const Decay decay{lr, beta1, beta2, at.kind()};
  run<float>(lists, at, narrow, offsets,
             AdamW<float>(lr, beta1, beta2, eps, weight_decay, maximize), decay, device);
  run<double>(lists, at, wide, offsets,
              AdamW<double>(lr, beta1, beta2, eps, weight_decay, maximize), decay, device);
}

}  // namespace
}  // namespace deepopt::cuda

DEEPOPT_CUDA_LIBRARY { m.impl("adamw_", TORCH_BOX(&deepopt::cuda::adamw_)); }
