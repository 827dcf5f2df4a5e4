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

void delta_write(const Memory<const float>& old, const float* grad, const Shape& shape, double rate,
                 double retention, const Memory<float>& result);

}  // namespace deepopt::small
