// What all rules share: how they are declared, and their elementary operations.
//
// A rule is the arithmetic of one entry, or of one row, and nothing else: no loop over tensors, no
// launch, no allocation. The launchers in csrc/cpu and csrc/cuda call the same rule, so both
// compute the same thing. The compiler may not contract a product and a sum to an fma by itself: an
// fma is written where torch has one, and a rule gives the same bits whatever is vectorized.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DEEPOPT_RULE __host__ __device__ __forceinline__
#else
#define DEEPOPT_RULE inline __attribute__((always_inline))
#endif

namespace deepopt {

DEEPOPT_RULE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
DEEPOPT_RULE double fma_(double a, double b, double c) { return fma(a, b, c); }
DEEPOPT_RULE float sqrt_(float a) { return sqrtf(a); }
DEEPOPT_RULE double sqrt_(double a) { return sqrt(a); }

// torch's lerp, bit for bit: it starts from the nearer end.
template <class T>
DEEPOPT_RULE T lerp(T from, T to, T weight) {
  return weight < T(0.5) ? fma_(weight, to - from, from) : fma_(weight - T(1), to - from, to);
}

DEEPOPT_RULE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DEEPOPT_RULE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace deepopt
