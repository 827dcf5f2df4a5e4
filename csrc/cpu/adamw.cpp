// deepopt::adamw_ on the CPU.
#include "../rules/adamw.h"

#include "parameter.h"

namespace deepopt {
namespace {

using Walk5 = Walk<5>;
using Places5 = Places<5>;

// P, G and S: of the parameter, the gradient and the state, in whose precision the rule runs.
template <class P, class G, class S, Rounding R>
inline __attribute__((always_inline)) void loop(const Places5& at, const AdamW<S>& given,
                                                const Noise& noise) {
  const AdamW<S> rule = given;
  char *p = at.at[0], *g = at.at[1], *m = at.at[2], *v = at.at[3], *low = at.at[4];
  const auto& s = at.stride;
  const uint32_t key = noise.key, place = noise.place(p);
  const auto entry = [&](char* p, const char* g, char* m, char* v, char* low, uint32_t place) {
    // In registers till the end: through memory, the first average would be read back at once.
    S value = wide<P, S, R>(p, low);
    S first = *reinterpret_cast<S*>(m), second = *reinterpret_cast<S*>(v);
    rule(value, S(*reinterpret_cast<const G*>(g)), first, second);
    *reinterpret_cast<S*>(m) = first;
    *reinterpret_cast<S*>(v) = second;
    put<P, S, R>(value, p, low, key, place);
  };
  if (s[0] == sizeof(P) && s[1] == sizeof(G) && s[2] == sizeof(S) && s[3] == sizeof(S) &&
      s[4] == sizeof(P)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < at.count; ++i) {
      entry(p + i * sizeof(P), g + i * sizeof(G), m + i * sizeof(S), v + i * sizeof(S),
            low + i * sizeof(P), place + uint32_t(i));
    }
  } else {
    for (int64_t i = 0; i < at.count; ++i) {
      entry(p + i * s[0], g + i * s[1], m + i * s[2], v + i * s[3], low + i * s[4],
            noise.place(p + i * s[0]));
    }
  }
}

// Templates cannot be cloned: each combination has a function of its own.
#define KERNEL(NAME, P, G, S, R)                                                          \
  DEEPOPT_CLONES void NAME(const Places5& at, const AdamW<S>& rule, const Noise& noise) { \
    loop<P, G, S, Rounding::R>(at, rule, noise);                                          \
  }
KERNEL(all_double, double, double, double, nearest)
KERNEL(all_float, float, float, float, nearest)
KERNEL(fp16_fp16, fp16, fp16, float, nearest)
KERNEL(fp16_float, fp16, float, float, nearest)
KERNEL(bf16_bf16, bf16, bf16, float, nearest)
KERNEL(bf16_float, bf16, float, float, nearest)
KERNEL(bf16_bf16_stochastic, bf16, bf16, float, stochastic)
KERNEL(bf16_float_stochastic, bf16, float, float, stochastic)
KERNEL(bf16_bf16_exact, bf16, bf16, float, exact)
KERNEL(bf16_float_exact, bf16, float, float, exact)
#undef KERNEL

template <class S>
using Kernel = void (*)(const Places5&, const AdamW<S>&, const Noise&);

Kernel<float> kernel_for(ScalarType param, ScalarType grad, Rounding rounding) {
  const bool same = grad == param;
  STD_TORCH_CHECK(same || grad == ScalarType::Float, "deepopt::adamw_: a gradient's dtype has no kernel");
  if (param == ScalarType::Float) return all_float;
  if (param == ScalarType::Half) return same ? fp16_fp16 : fp16_float;
  STD_TORCH_CHECK(param == ScalarType::BFloat16, "deepopt::adamw_: a parameter's dtype has no kernel");
  if (rounding == Rounding::exact) return same ? bf16_bf16_exact : bf16_float_exact;
  if (rounding == Rounding::stochastic) return same ? bf16_bf16_stochastic : bf16_float_stochastic;
  return same ? bf16_bf16 : bf16_float;
}

// Counts up one number of a tensor of them, and returns it.
double count_up(const Tensor& steps, int64_t index) {
  if (steps.scalar_type() == ScalarType::Double) return steps.mutable_data_ptr<double>()[index] += 1;
  return steps.mutable_data_ptr<float>()[index] += 1;
}

struct Lists {
  std::vector<Tensor> params, grads, exp_avgs, exp_avg_sqs, steps, lows;
  std::vector<int64_t> seeds;

  // State of all parameters can be one tensor, which spares a handle for each.
  bool joined() const { return exp_avgs.size() == 1 && params.size() != 1; }
};

template <class S, class Select>
void run(const Lists& lists, const std::vector<size_t>& which, const std::vector<int64_t>& offsets,
         const AdamW<S>& alike, double lr, double beta1, double beta2, const Select& select) {
  const auto& [params, grads, exp_avgs, exp_avg_sqs, steps, lows, seeds] = lists;
  const Roundings roundings{params, lows, seeds};
  const bool joined = lists.joined();
  std::vector<AdamW<S>> rules(which.size(), alike);
  std::vector<Walk5> walks;
  std::vector<Noise> noises;
  std::vector<Kernel<S>> kernels;
  walks.reserve(which.size());
  kernels.reserve(which.size());
  for (size_t t : which) {
    check_written(params[t]);
    check_same_shape(grads[t], params[t]);
    const View low(roundings.low(t));
    noises.push_back(roundings.noise(t));
    kernels.push_back(select(params[t].scalar_type(), grads[t].scalar_type(), roundings.of(t)));
    if (joined) {
      walks.emplace_back(params[t], std::array<View, 5>{View(params[t]), View(grads[t]),
                                                        View(exp_avgs[0], offsets[t]),
                                                        View(exp_avg_sqs[0], offsets[t]), low});
    } else {
      check_written(exp_avgs[t]);
      check_written(exp_avg_sqs[t]);
      check_same_shape(exp_avgs[t], params[t]);
      check_same_shape(exp_avg_sqs[t], params[t]);
      walks.emplace_back(params[t], std::array<View, 5>{View(params[t]), View(grads[t]),
                                                        View(exp_avgs[t]), View(exp_avg_sqs[t]),
                                                        low});
    }
  }
  for (size_t i = 0; i < which.size(); ++i) {  // nothing can go wrong from here on
    const size_t t = which[i];
    rules[i].at_step(lr, beta1, beta2, joined ? count_up(steps[0], t) : count_up(steps[t], 0));
  }
  for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
    walks[t].between(begin, end, [&](const Places5& at) { kernels[t](at, rules[t], noises[t]); });
  });
}

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> lows,
            std::vector<int64_t> seeds, double lr, double beta1, double beta2, double eps,
            double weight_decay, bool maximize) {
  const Lists lists{std::move(params), std::move(grads), std::move(exp_avgs),
                    std::move(exp_avg_sqs), std::move(steps), std::move(lows), std::move(seeds)};
  Roundings{lists.params, lists.lows, lists.seeds}.check();
  const size_t count = lists.params.size(), states = lists.joined() ? 1 : count;
  STD_TORCH_CHECK(lists.grads.size() == count && lists.exp_avgs.size() == states &&
                      lists.exp_avg_sqs.size() == states && lists.steps.size() == states,
                  "deepopt::adamw_: the lists must have one tensor for each parameter");
  std::vector<size_t> narrow, precise;
  std::vector<int64_t> offsets{0};
  for (size_t t = 0; t < count; ++t) {
    const ScalarType dtype = lists.params[t].scalar_type();
    (dtype == ScalarType::Double ? precise : narrow).push_back(t);
    offsets.push_back(offsets.back() + lists.params[t].numel());
    const auto state = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    const size_t s = lists.joined() ? 0 : t;
    STD_TORCH_CHECK(lists.exp_avgs[s].scalar_type() == state &&
                        lists.exp_avg_sqs[s].scalar_type() == state,
                    "deepopt::adamw_: state must be float32, or float64 for float64 parameters");
  }
  for (const Tensor& steps : lists.steps) {
    const ScalarType dtype = steps.scalar_type();
    STD_TORCH_CHECK((lists.joined() || steps.numel() == 1) &&
                        (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "deepopt::adamw_: steps must be one float32 or float64 number for each parameter");
  }
  if (lists.joined()) {
    STD_TORCH_CHECK(lists.exp_avgs[0].is_contiguous() && lists.exp_avg_sqs[0].is_contiguous() &&
                        lists.steps[0].is_contiguous(),
                    "deepopt::adamw_: state in one tensor must be contiguous");
    STD_TORCH_CHECK(lists.exp_avgs[0].numel() == offsets.back() &&
                        lists.exp_avg_sqs[0].numel() == offsets.back() &&
                        lists.steps[0].numel() == int64_t(count),
                    "deepopt::adamw_: state in one tensor must have the entries of all parameters");
  }
  run<float>(lists, narrow, offsets,
             AdamW<float>(lr, beta1, beta2, eps, weight_decay, maximize), lr, beta1, beta2,
             kernel_for);
  run<double>(lists, precise, offsets, AdamW<double>(lr, beta1, beta2, eps, weight_decay, maximize),
              lr, beta1, beta2, [](ScalarType param, ScalarType grad, Rounding) {
                STD_TORCH_CHECK(grad == param, "deepopt::adamw_: a gradient must be float64, too");
                return all_double;
              });
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("adamw_", TORCH_BOX(&deepopt::adamw_)); }
