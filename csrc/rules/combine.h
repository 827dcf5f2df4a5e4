// A linear combination, entry by entry: c_0 x_0 + c_1 x_1 + ..., from left to right.
#pragma once
#include "rule.h"

namespace deepopt {

template <class T>
DEEPOPT_RULE T weighed(T c, T x) { return c * x; }

template <class T>
DEEPOPT_RULE T weighed_onto(T sum, T c, T x) { return fma_(c, x, sum); }

}  // namespace deepopt
