// Newton-Schulz and the delta write in float32, for matrices so small that calls into torch cost
// more than their arithmetic. Larger ones come out right too, but slowly.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace deepopt::small {

struct Shape {
  int64_t batch, rows, columns;
};

void newton_schulz(const float* matrices, const Shape& shape,
                   const std::vector<std::array<float, 3>>& coefficients, float* result);

// The delta memory of a stack: its momentum, and two running averages for every matrix.
template <class T>
struct Memory {
  T *momentum, *norm, *erasure;
};

// Upper bound on the size of a gradient: HEADROOM in deepopt/ops/delta_write.py.
constexpr double kLargest = 3.4028234663852886e38 / 16;

// The factors of the momentum, of what is erased of it, and of the gradient in a sum.
struct Shares {
  float kept, erased, fresh;
};

// The shares of the new momentum, and of the look-ahead.
struct DeltaShares {
  Shares written, ahead;

  // `cut` is the share of the gradient that counts: 1 but for those beyond kLargest.
  DeltaShares(double retention, double erasure, double cut)
      : written{float(retention), -1, float((1 - retention) * cut)} {
    const double gain = 1 + erasure / (1 - retention);
    ahead = {float(gain * retention * retention), float(-2 * gain * retention),
             float(gain * (1 - retention * retention) * cut)};
  }
};

// Writes the new memory, and the look-ahead of every matrix.
void delta_write(const Memory<const float>& old, const float* grad, const Shape& shape, double rate,
                 double retention, const Memory<float>& result, float* ahead);

}  // namespace deepopt::small
