// deepopt::move_ on the CPU.
#include "../rules/move.h"

#include "parameter.h"

namespace deepopt {
namespace {

using Walk3 = Walk<3>;
using Places3 = Places<3>;

template <class P, class S, Rounding R>
inline __attribute__((always_inline)) void loop(const Places3& at, const Move<S>& given,
                                                const Noise& noise) {
  const Move<S> rule = given;
  char *p = at.at[0], *low = at.at[2];
  const char* u = at.at[1];
  const auto& s = at.stride;
  const uint32_t key = noise.key, place = noise.place(p);
  if (s[0] == sizeof(P) && s[1] == sizeof(S) && s[2] == sizeof(P)) {
#pragma GCC ivdep
    for (int64_t i = 0; i < at.count; ++i) {
      char *entry = p + i * sizeof(P), *beside = low + i * sizeof(P);
      const S update = *reinterpret_cast<const S*>(u + i * sizeof(S));
      put<P, S, R>(rule(wide<P, S, R>(entry, beside), update), entry, beside, key,
                   place + uint32_t(i));
    }
  } else {
    for (int64_t i = 0; i < at.count; ++i) {
      char *entry = p + i * s[0], *beside = low + i * s[2];
      const S update = *reinterpret_cast<const S*>(u + i * s[1]);
      put<P, S, R>(rule(wide<P, S, R>(entry, beside), update), entry, beside, key,
                   noise.place(entry));
    }
  }
}

#define KERNEL(NAME, P, S, R)                                                           \
  DEEPOPT_CLONES void NAME(const Places3& at, const Move<S>& rule, const Noise& noise) { \
    loop<P, S, Rounding::R>(at, rule, noise);                                           \
  }
KERNEL(move_double, double, double, nearest)
KERNEL(move_float, float, float, nearest)
KERNEL(move_fp16, fp16, float, nearest)
KERNEL(move_bf16, bf16, float, nearest)
KERNEL(move_bf16_stochastic, bf16, float, stochastic)
KERNEL(move_bf16_exact, bf16, float, exact)
#undef KERNEL

using Kernel = void (*)(const Places3&, const Move<float>&, const Noise&);

Kernel kernel_for(ScalarType dtype, Rounding rounding) {
  if (dtype == ScalarType::Float) return move_float;
  if (dtype == ScalarType::Half) return move_fp16;
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "deepopt::move_: a parameter's dtype has no kernel");
  if (rounding == Rounding::nearest) return move_bf16;
  return rounding == Rounding::exact ? move_bf16_exact : move_bf16_stochastic;
}

void move_(std::vector<Tensor> params, std::vector<Tensor> updates, std::vector<Tensor> lows,
           std::vector<int64_t> seeds, double lr, double weight_decay) {
  const Roundings roundings{params, lows, seeds};
  roundings.check();
  STD_TORCH_CHECK(updates.size() == params.size(), "deepopt::move_: one update for each parameter");
  const Move<float> narrow(lr, weight_decay);
  const Move<double> precise(lr, weight_decay);
  std::vector<Walk3> walks;
  std::vector<Kernel> kernels;
  std::vector<Noise> noises;
  walks.reserve(params.size());
  for (size_t t = 0; t < params.size(); ++t) {
    const bool precisely = params[t].scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(updates[t].scalar_type() == (precisely ? ScalarType::Double : ScalarType::Float),
                    "deepopt::move_: an update's dtype has no kernel");
    kernels.push_back(precisely ? nullptr : kernel_for(params[t].scalar_type(), roundings.of(t)));
    noises.push_back(roundings.noise(t));
    check_written(params[t]);
    check_same_shape(updates[t], params[t]);
    walks.emplace_back(params[t], std::array<View, 3>{View(params[t]), View(updates[t]),
                                                      View(roundings.low(t))});
  }
  for_chunks(walks, [&](size_t t, int64_t begin, int64_t end) {
    walks[t].between(begin, end, [&](const Places3& at) {
      if (kernels[t]) {
        kernels[t](at, narrow, noises[t]);
      } else {
        move_double(at, precise, noises[t]);
      }
    });
  });
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) { m.impl("move_", TORCH_BOX(&deepopt::move_)); }
