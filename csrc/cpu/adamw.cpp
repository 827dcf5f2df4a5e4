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

double count_up(const Tensor& step) {
  if (step.scalar_type() == ScalarType::Double) return *step.mutable_data_ptr<double>() += 1;
  return *step.mutable_data_ptr<float>() += 1;
}

template <class S, class Select>
void run(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
         const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
         const std::vector<Tensor>& steps, const std::vector<size_t>& which, double lr,
         double beta1, double beta2, double eps, double weight_decay, bool maximize,
         const Select& select) {
  std::vector<AdamW<S>> rules;
  std::vector<Walk4> walks;
  std::vector<Kernel<S>> kernels;
  rules.reserve(which.size());
  walks.reserve(which.size());
  kernels.reserve(which.size());
  for (size_t t : which) {
    kernels.push_back(select(params[t].scalar_type(), grads[t].scalar_type()));
    walks.emplace_back(
        std::array<const Tensor*, 4>{&params[t], &grads[t], &exp_avgs[t], &exp_avg_sqs[t]});
  }
  for (size_t t : which) {  // nothing can go wrong from here on
    rules.emplace_back(lr, beta1, beta2, eps, weight_decay, maximize);
    rules.back().at_step(lr, beta1, beta2, count_up(steps[t]));
  }
  for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
    walks[t].between(begin, end, [&](const Places4& at) { kernels[t](at, rules[t]); });
  });
}

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
            double beta2, double eps, double weight_decay, bool maximize) {
  std::vector<size_t> narrow, wide;
  for (size_t t = 0; t < params.size(); ++t) {
    (params[t].scalar_type() == ScalarType::Double ? wide : narrow).push_back(t);
  }
  run<float>(params, grads, exp_avgs, exp_avg_sqs, steps, narrow, lr, beta1, beta2, eps,
             weight_decay, maximize, kernel_for);
  run<double>(params, grads, exp_avgs, exp_avg_sqs, steps, wide, lr, beta1, beta2, eps,
              weight_decay, maximize, [](ScalarType, ScalarType) { return all_double; });
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("adamw_", TORCH_BOX(&deepopt::adamw_)); }
