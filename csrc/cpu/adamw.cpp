// deepopt::adamw_ on the CPU.
#include "../rules/adamw.h"

#include "multi_tensor.h"

namespace deepopt {
namespace {

using Walk4 = Walk<4>;
using Places4 = Places<4>;

// P, G and S: of the parameter, the gradient and the state, in whose precision the rule runs.
template <class P, class G, class S>
inline __attribute__((always_inline)) void loop(const Places4& at, const AdamW<S>& rule) {
  char *p = at.at[0], *g = at.at[1], *m = at.at[2], *v = at.at[3];
  const auto& s = at.stride;
  const auto entry = [&](char* p, const char* g, char* m, char* v) {
    S wide = S(*reinterpret_cast<P*>(p));
    rule(wide, S(*reinterpret_cast<const G*>(g)), *reinterpret_cast<S*>(m), *reinterpret_cast<S*>(v));
    *reinterpret_cast<P*>(p) = P(wide);
  };
  if (s[0] == sizeof(P) && s[1] == sizeof(G) && s[2] == sizeof(S) && s[3] == sizeof(S)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < at.count; ++i) {
      entry(p + i * sizeof(P), g + i * sizeof(G), m + i * sizeof(S), v + i * sizeof(S));
    }
  } else {
    for (int64_t i = 0; i < at.count; ++i) {
      entry(p + i * s[0], g + i * s[1], m + i * s[2], v + i * s[3]);
    }
  }
}

// Templates cannot be cloned: each combination has a function of its own.
#define KERNEL(NAME, P, G, S) \
  DEEPOPT_CLONES void NAME(const Places4& at, const AdamW<S>& rule) { loop<P, G, S>(at, rule); }
KERNEL(all_double, double, double, double)
KERNEL(all_float, float, float, float)
KERNEL(bf16_bf16, bf16, bf16, float)
KERNEL(bf16_float, bf16, float, float)
KERNEL(fp16_fp16, fp16, fp16, float)
KERNEL(fp16_float, fp16, float, float)
#undef KERNEL

template <class S>
using Kernel = void (*)(const Places4&, const AdamW<S>&);

Kernel<float> kernel_for(ScalarType param, ScalarType grad) {
  if (param == ScalarType::Float && grad == param) return all_float;
  if (param == ScalarType::BFloat16) return grad == param ? bf16_bf16 : bf16_float;
  if (param == ScalarType::Half) return grad == param ? fp16_fp16 : fp16_float;
  STD_TORCH_CHECK(false, "deepopt::adamw_: a parameter's or gradient's dtype has no kernel");
}

// Counts up one number of a tensor of them, and returns it.
double count_up(const Tensor& steps, int64_t index) {
  if (steps.scalar_type() == ScalarType::Double) return steps.mutable_data_ptr<double>()[index] += 1;
  return steps.mutable_data_ptr<float>()[index] += 1;
}

struct Lists {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, steps;

  // State of all parameters can be one tensor, which spares a handle for each.
  bool joined() const { return exp_avgs.size() == 1 && params.size() != 1; }
};

template <class S, class Select>
void run(const Lists& lists, const std::vector<size_t>& which, const std::vector<int64_t>& offsets,
         const AdamW<S>& alike, double lr, double beta1, double beta2, const Select& select) {
  const auto& [params, grads, exp_avgs, exp_avg_sqs, steps] = lists;
  const bool joined = lists.joined();
  std::vector<AdamW<S>> rules(which.size(), alike);
  std::vector<Walk4> walks;
  std::vector<Kernel<S>> kernels;
  walks.reserve(which.size());
  kernels.reserve(which.size());
  for (size_t t : which) {
    check_same_shape(grads[t], params[t]);
    kernels.push_back(select(params[t].scalar_type(), grads[t].scalar_type()));
    if (joined) {
      walks.emplace_back(params[t], std::array<View, 4>{View(params[t]), View(grads[t]),
                                                        View(exp_avgs[0], offsets[t]),
                                                        View(exp_avg_sqs[0], offsets[t])});
    } else {
      check_same_shape(exp_avgs[t], params[t]);
      check_same_shape(exp_avg_sqs[t], params[t]);
      walks.emplace_back(params[t], std::array<View, 4>{View(params[t]), View(grads[t]),
                                                        View(exp_avgs[t]), View(exp_avg_sqs[t])});
    }
  }
  for (size_t i = 0; i < which.size(); ++i) {  // nothing can go wrong from here on
    const size_t t = which[i];
    rules[i].at_step(lr, beta1, beta2, joined ? count_up(steps[0], t) : count_up(steps[t], 0));
  }
  for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
    walks[t].between(begin, end, [&](const Places4& at) { kernels[t](at, rules[t]); });
  });
}

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
            double beta2, double eps, double weight_decay, bool maximize) {
  const Lists lists{std::move(params), std::move(grads), std::move(exp_avgs),
                    std::move(exp_avg_sqs), std::move(steps)};
  const size_t count = lists.params.size(), states = lists.joined() ? 1 : count;
  STD_TORCH_CHECK(lists.grads.size() == count && lists.exp_avgs.size() == states &&
                      lists.exp_avg_sqs.size() == states && lists.steps.size() == states,
                  "deepopt::adamw_: the lists must have one tensor for each parameter");
  std::vector<size_t> narrow, wide;
  std::vector<int64_t> offsets{0};
  for (size_t t = 0; t < count; ++t) {
    const ScalarType dtype = lists.params[t].scalar_type();
    (dtype == ScalarType::Double ? wide : narrow).push_back(t);
    offsets.push_back(offsets.back() + lists.params[t].numel());
    const auto state = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    const size_t s = lists.joined() ? 0 : t;
    STD_TORCH_CHECK(lists.exp_avgs[s].scalar_type() == state &&
                        lists.exp_avg_sqs[s].scalar_type() == state,
                    "deepopt::adamw_: state must be float32, or float64 for float64 parameters");
  }
  if (lists.joined()) {
    STD_TORCH_CHECK(lists.exp_avgs[0].numel() == offsets.back() &&
                        lists.exp_avg_sqs[0].numel() == offsets.back() &&
                        lists.steps[0].numel() == int64_t(count),
                    "deepopt::adamw_: state in one tensor must have the entries of all parameters");
  }
  run<float>(lists, narrow, offsets,
             AdamW<float>(lr, beta1, beta2, eps, weight_decay, maximize), lr, beta1, beta2,
             kernel_for);
  run<double>(lists, wide, offsets, AdamW<double>(lr, beta1, beta2, eps, weight_decay, maximize),
              lr, beta1, beta2, [](ScalarType param, ScalarType grad) {
                STD_TORCH_CHECK(grad == param, "deepopt::adamw_: a gradient must be float64, too");
                return all_double;
              });
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("adamw_", TORCH_BOX(&deepopt::adamw_)); }
