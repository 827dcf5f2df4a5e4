// deepopt::apply_update_ on the CPU.
#include "../common/apply_update_arguments.h"

#include "entries.h"

namespace deepopt {
namespace {

template <class P, class S, Rounding R>
inline __attribute__((always_inline)) void loop(const Places<3>& at, const ApplyUpdate<S>& given,
                                                const Noise& noise) {
  const ApplyUpdate<S> rule = given;  // a copy: what is written could otherwise be the rule itself
  const uint32_t key = noise.key;
  for_entries<sizeof(P), sizeof(S), sizeof(P)>(
      at, noise, [&](const std::array<char*, 3>& entry, uint32_t place) {
        const auto& [param, update, low] = entry;
        const S old = to_fp32<P, S, R>(param, low);
        store_rounded<P, S, R>(rule(old, *reinterpret_cast<const S*>(update)), param, low, key,
                               place);
      });
}

#define KERNEL(NAME, P, S, R)                                                                     \
  DEEPOPT_CLONES void NAME(const Places<3>& at, const ApplyUpdate<S>& rule, const Noise& noise) { \
    loop<P, S, Rounding::R>(at, rule, noise);                                                     \
  }
KERNEL(apply_update_double, double, double, nearest)
KERNEL(apply_update_float, float, float, nearest)
KERNEL(apply_update_fp16, fp16, float, nearest)
KERNEL(apply_update_bf16, bf16, float, nearest)
KERNEL(apply_update_bf16_stochastic, bf16, float, stochastic)
KERNEL(apply_update_bf16_exact, bf16, float, exact)
#undef KERNEL

using Kernel = void (*)(const Places<3>&, const ApplyUpdate<float>&, const Noise&);

Kernel kernel_for(ScalarType param, Rounding rounding) {
  if (param == ScalarType::Double) return nullptr;  // the one kernel in float64
  if (param == ScalarType::Float) return apply_update_float;
  if (param == ScalarType::Half) return apply_update_fp16;
  STD_TORCH_CHECK(param == ScalarType::BFloat16,
                  "deepopt::apply_update_: a parameter's dtype has no kernel");
  if (rounding == Rounding::nearest) return apply_update_bf16;
  return rounding == Rounding::exact ? apply_update_bf16_exact : apply_update_bf16_stochastic;
}

void apply_update_(const ApplyUpdateArguments& given) {
  given.check();
  const Roundings roundings = given.roundings();
  const auto narrow = given.rule<float>();
  const auto wide = given.rule<double>();
  std::vector<Walk<3>> walks;
  std::vector<Kernel> kernels;
  std::vector<Noise> noises;
  walks.reserve(given.params.size());
  for (size_t t = 0; t < given.params.size(); ++t) {
    kernels.push_back(kernel_for(given.params[t].scalar_type(), roundings.of(t)));
    noises.push_back(roundings.noise(t));
    given.add_walk(walks, t);
  }
  for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
    walks[t].between(begin, end, [&](const Places<3>& at) {
      if (kernels[t]) {
        kernels[t](at, narrow, noises[t]);
      } else {
        apply_update_double(at, wide, noises[t]);
      }
    });
  });
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("apply_update_", &deepopt::boxed<&deepopt::apply_update_, deepopt::ApplyUpdateArguments>);
}
