// tanh in float32: odd, within 6 units in the last place, never beyond 1, NaN for NaN.
//
// It is x P(x^2) / Q(x^2), with the polynomials of degree 4 whose largest relative error on
// [-9.011, 9.011], where tanh has come to 1, is least: 2.1e-8. All coefficients are positive, so
// nothing cancels. There is no branch and no table, so compilers vectorize it.
#pragma once
#include "rule.h"

namespace deepopt {

// The smaller of x and `bound`. NaN stays NaN, since every comparison with it is false.
DEEPOPT_RULE float at_most(float x, float bound) { return x > bound ? bound : x; }

DEEPOPT_RULE float tanh_(float x) {
  const float z = at_most(x * x, 81.19631881f);  // beyond, the quotient grows with x and is cut off
  float p = fma_(z, 1.333496426e-08f, 2.059491191e-05f);
  p = fma_(z, p, 3.494728271e-03f);
  p = fma_(z, p, 1.338030194e-01f);
  p = fma_(z, p, 9.999999792e-01f);
  float q = fma_(z, 7.768511136e-07f, 3.284227834e-04f);
  q = fma_(z, q, 2.587371192e-02f);
  q = fma_(z, q, 4.671361735e-01f);
  q = fma_(z, q, 1.0f);
  const float quotient = x * p / q;
  return copysignf(at_most(fabsf(quotient), 1.0f), quotient);
}

}  // namespace deepopt
