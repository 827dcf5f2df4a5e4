// Sums of products of float32 entries, in double. Every product is exact there, and none leaves the
// range: neither scaling nor a second pass is needed.
#pragma once
#include <cfloat>

#include "rule.h"

namespace deepopt {

DEEPOPT_RULE double product(float a, float b) { return double(a) * double(b); }

// The root of a sum of squares. It is NaN where an entry was not finite: finite floats cannot bring
// the sum to infinity.
DEEPOPT_RULE float norm_of(double squares) {
  const double root = sqrt_(squares);
  if (!(squares <= DBL_MAX)) return float_of(0x7fc00000u);
  return root < double(FLT_MAX) ? float(root) : FLT_MAX;
}

}  // namespace deepopt
