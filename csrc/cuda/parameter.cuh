// How kernels read and write the entries of a parameter, whatever its dtype and rounding. The same
// for the CPU is in csrc/common/roundings.h.
#pragma once
#include "../rules/rounding.h"
#include "device.cuh"

namespace deepopt {

template <class P>
__device__ __forceinline__ uint16_t low_half(const P& x) {
  uint16_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <Rounding R, class P>
__device__ __forceinline__ auto to_fp32(const P& p, uint16_t low) {
  if constexpr (R == Rounding::exact) {
    return joined(low_half(p), low);
  } else {
    return widened(p);
  }
}

template <Rounding R, class P, class S>
__device__ __forceinline__ void store_rounded(S value, P& p, uint16_t& low, uint32_t key,
                                              uint32_t place) {
  if constexpr (R == Rounding::nearest) {
    narrow(value, p);
  } else {
    uint16_t bits;
    if constexpr (R == Rounding::exact) {
      split(value, bits, low);
    } else {
      bits = stochastic(value, key, place);
    }
    memcpy(&p, &bits, sizeof bits);
  }
}

// The low bits of V entries, where there are any.
template <Rounding R, int V>
__device__ __forceinline__ Pack<uint16_t, V> load_low(const uint16_t* from) {
  if constexpr (R == Rounding::exact) {
    return load<V>(from);
  } else {
    return {};
  }
}

template <Rounding R, int V>
__device__ __forceinline__ void store_low(uint16_t* to, const Pack<uint16_t, V>& low) {
  if constexpr (R == Rounding::exact) store(to, low);
}

// Calls f with the type of a parameter's entries, as a null pointer to it, and the rounding as a
// type.
template <Rounding R>
struct Rounds {
  static constexpr Rounding how = R;
};

template <class F>
void with_parameter(Kind kind, Rounding rounding, const F& f) {
  using Nearest = Rounds<Rounding::nearest>;
  if (kind == Kind::f32) {
    f(static_cast<float*>(nullptr), Nearest());
  } else if (kind == Kind::fp16) {
    f(static_cast<fp16*>(nullptr), Nearest());
  } else if (rounding == Rounding::exact) {
    f(static_cast<bf16*>(nullptr), Rounds<Rounding::exact>());
  } else if (rounding == Rounding::stochastic) {
    f(static_cast<bf16*>(nullptr), Rounds<Rounding::stochastic>());
  } else {
    f(static_cast<bf16*>(nullptr), Nearest());
  }
}

}  // namespace deepopt
