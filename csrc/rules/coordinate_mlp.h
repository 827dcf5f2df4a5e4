// The coordinate MLP, entry by entry. With features x_f = s_f y_f:
//
//   a_k = tanh(sum_f w_kf x_f),  c = tanh(sum_k v_k a_k),  result = base + reach c
//
// and the gradient of 1/2 ((result - target) / unit)^2, divided by the number of entries, with
// respect to the weights:
//
//   slope = (result - target) / unit * reach / unit / entries * (1 - c^2)
//   d v_k = slope a_k,  d w_kf = v_k slope (1 - a_k^2) x_f
#pragma once
#include "tanh.h"

namespace deepopt {

// The arrays hold the B matrices of a stack one after the other.
struct CoordinateMlp {
  static constexpr int kMostFeatures = 4;

  const float *base, *reach, *scales, *weights;
  const float* features[kMostFeatures];
  int count, units;        // features, and hidden units
  int64_t batch, entries;  // of a matrix
};

template <int F>
DEEPOPT_RULE float unit_value(const float* w, const float (&x)[F]) {
  float drive = w[0] * x[0];
  for (int f = 1; f < F; ++f) drive = fma_(w[f], x[f], drive);
  return tanh_(drive);
}

struct Correction {
  float reach, inverse_unit, share;  // share is reach / unit / entries

  DEEPOPT_RULE float result(float base, float value) const {
    return fma_(reach, tanh_(value), base);
  }

  DEEPOPT_RULE float slope(float base, float value, float target) const {
    const float c = tanh_(value);
    return (fma_(reach, c, base) - target) * inverse_unit * share * (1.0f - c * c);
  }
};

}  // namespace deepopt
