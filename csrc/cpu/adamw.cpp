// deepopt::adamw_ on the CPU.
#include "../common/adamw_arguments.h"

#include "entries.h"

namespace deepopt {
namespace {

// P, G and S are the types of the parameter, the gradient and the state; the rule runs in S.
template <class P, class G, class S, Rounding R>
inline __attribute__((always_inline)) void loop(const Places<5>& at, const AdamW<S>& given,
                                                const Noise& noise) {
  const AdamW<S> rule = given;  // a copy: what is written could otherwise be the rule itself
  const uint32_t key = noise.key;
  for_entries<sizeof(P), sizeof(G), sizeof(S), sizeof(S), sizeof(P)>(
      at, noise, [&](const std::array<char*, 5>& entry, uint32_t place) {
        const auto& [param, grad, m, v, low] = entry;
        // In registers until the end: through memory, the first average would be read back at once.
        S value = to_fp32<P, S, R>(param, low);
        S first = *reinterpret_cast<S*>(m), second = *reinterpret_cast<S*>(v);
        rule(value, S(*reinterpret_cast<const G*>(grad)), first, second);
        *reinterpret_cast<S*>(m) = first;
        *reinterpret_cast<S*>(v) = second;
        store_rounded<P, S, R>(value, param, low, key, place);
      });
}

// Templates cannot be cloned: each combination has a function of its own.
#define KERNEL(NAME, P, G, S, R)                                                            \
  DEEPOPT_CLONES void NAME(const Places<5>& at, const AdamW<S>& rule, const Noise& noise) { \
    loop<P, G, S, Rounding::R>(at, rule, noise);                                            \
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
using Kernel = void (*)(const Places<5>&, const AdamW<S>&, const Noise&);

template <class S>
Kernel<S> kernel_for(ScalarType param, ScalarType grad, Rounding rounding) {
  const bool same = grad == param;
  if constexpr (sizeof(S) == sizeof(double)) {
    STD_TORCH_CHECK(same, "deepopt::adamw_: a gradient must be float64, too");
    return all_double;
  } else {
    STD_TORCH_CHECK(same || grad == ScalarType::Float,
                    "deepopt::adamw_: a gradient's dtype has no kernel");
    if (param == ScalarType::Float) return all_float;
    if (param == ScalarType::Half) return same ? fp16_fp16 : fp16_float;
    STD_TORCH_CHECK(param == ScalarType::BFloat16,
                    "deepopt::adamw_: a parameter's dtype has no kernel");
    if (rounding == Rounding::exact) return same ? bf16_bf16_exact : bf16_float_exact;
    if (rounding == Rounding::stochastic)
      return same ? bf16_bf16_stochastic : bf16_float_stochastic;
    return same ? bf16_bf16 : bf16_float;
  }
}

// Counts up the number in a tensor, and returns it.
double count_up(const Tensor& step) {
  if (step.scalar_type() == ScalarType::Double) return *step.mutable_data_ptr<double>() += 1;
  return *step.mutable_data_ptr<float>() += 1;
}

// The parameters whose state is of type S, checked and ready to be stepped.
template <class S>
struct Stepped {
  const AdamWArguments& given;
  std::vector<size_t> which;
  std::vector<Walk<5>> walks;
  std::vector<Noise> noises;
  std::vector<Kernel<S>> kernels;

  Stepped(const AdamWArguments& arguments, ScalarType state)
      : given(arguments), which(arguments.with_state(state)) {
    const Roundings roundings = given.roundings();
    walks.reserve(which.size());
    noises.reserve(which.size());
    kernels.reserve(which.size());
    for (size_t t : which) {
      given.add_walk(walks, t);
      noises.push_back(roundings.noise(t));
      kernels.push_back(kernel_for<S>(given.params[t].scalar_type(), given.grads[t].scalar_type(),
                                      roundings.of(t)));
    }
  }

  void run() const {
    std::vector<AdamW<S>> rules;
    rules.reserve(which.size());
    AdamW<S> rule = given.rule<S>();
    double last = 0;
    for (size_t t : which) {
      const double count = count_up(given.steps[t]);
      // Most counts are alike, and two powers take as long as the entries of a small tensor.
      if (rules.empty() || count != last) rule.at_step(given.lr, given.beta1, given.beta2, count);
      last = count;
      rules.push_back(rule);
    }
    for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
      walks[t].between(begin, end,
                       [&](const Places<5>& at) { kernels[t](at, rules[t], noises[t]); });
    });
  }
};

void adamw_(const AdamWArguments& given) {
  given.check();
  // Both are checked before either changes anything.
  const Stepped<float> narrow(given, ScalarType::Float);
  const Stepped<double> wide(given, ScalarType::Double);
  narrow.run();
  wide.run();
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("adamw_", &deepopt::boxed<&deepopt::adamw_, deepopt::AdamWArguments>);
}
