// Sums of products of float32 entries, in double: every product is exact and none leaves the range,
// so that neither scaling nor a second pass is needed.
#pragma once
#include <cfloat>

#include "rule.h"

namespace deepopt {

DEEPOPT_RULE double product(float a, float b) { return double(a) * double(b); }

// The root of a sum of squares; NaN where an entry was not finite, as nothing else makes one.
DEEPOPT_RULE float norm_of(double squares) {
  const double root = sqrt_(squares);
  if (!(squares <= DBL_MAX)) return float_of(0x7fc00000u);
  return root < double(FLT_MAX) ? float(root) : FLT_MAX;
}

}  // namespace deepopt
