// How launchers read and write the entries of a parameter, whatever its dtype and rounding. The
// CUDA kernels' own versions are in csrc/cuda/parameter.cuh.
#pragma once
#include "../rules/rounding.h"
#include "multi_tensor.h"

namespace deepopt {

// The source of stochastic rounding's bits: a key, and an entry's distance from the first.
struct Noise {
  uint32_t key;
  const char* first;  // entry of the parameter

  uint32_t place(const char* entry) const {
    return uint32_t((entry - first) / int64_t(sizeof(bf16)));
  }
};

// The number that an entry of type P stands for, in S: float32, or float64 for float64 parameters.
// `low` holds its low bits where they are kept.
template <class P, class S, Rounding R>
DEEPOPT_RULE S to_fp32(const char* entry, const char* low) {
  if constexpr (R == Rounding::exact) {
    return joined(*reinterpret_cast<const uint16_t*>(entry),
                  *reinterpret_cast<const uint16_t*>(low));
  } else {
    return S(*reinterpret_cast<const P*>(entry));
  }
}

template <class P, class S, Rounding R>
DEEPOPT_RULE void store_rounded(S value, char* entry, char* low, uint32_t key, uint32_t place) {
  if constexpr (R == Rounding::exact) {
    split(value, *reinterpret_cast<uint16_t*>(entry), *reinterpret_cast<uint16_t*>(low));
  } else if constexpr (R == Rounding::stochastic) {
    *reinterpret_cast<uint16_t*>(entry) = stochastic(value, key, place);
  } else {
    *reinterpret_cast<P*>(entry) = P(value);
  }
}

// The rounding of each parameter of a list. Only bfloat16 parameters have another than the nearest.
struct DEEPOPT_HIDDEN Roundings {
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& lows;
  const std::vector<int64_t>& seeds;

  void check() const {
    STD_TORCH_CHECK((lows.empty() || lows.size() == params.size()) &&
                        (seeds.empty() || seeds.size() == params.size()),
                    "deepopt: lows and seeds must be empty or one for each parameter");
    STD_TORCH_CHECK(lows.empty() || seeds.empty(), "deepopt: give lows or seeds, not both");
  }
  Rounding of(size_t t) const {
    if (params[t].scalar_type() != ScalarType::BFloat16) return Rounding::nearest;
    return !lows.empty()    ? Rounding::exact
           : !seeds.empty() ? Rounding::stochastic
                            : Rounding::nearest;
  }
  // The low bits of parameter t. Where it has none this is the parameter itself, as a walk needs
  // some tensor in that place; nothing is read from it there.
  const Tensor& low(size_t t) const {
    if (of(t) != Rounding::exact) return params[t];
    STD_TORCH_CHECK(lows[t].scalar_type() == ScalarType::Short, "deepopt: lows must be int16");
    return lows[t];
  }
  Noise noise(size_t t) const {
    return {of(t) == Rounding::stochastic ? key_of(seeds[t]) : 0,
            static_cast<const char*>(params[t].const_data_ptr())};
  }
};

}  // namespace deepopt
