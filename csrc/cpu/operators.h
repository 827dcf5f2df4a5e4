// Operators on the CPU that others are made of.
#pragma once
#include "../common/matrices.h"

namespace deepopt {

Tensor frobenius(Tensor matrices);
Tensor row_products(std::vector<Tensor> tensors);
Tensor combine(std::vector<Tensor> tensors, Tensor coefficients);
// The same into a given tensor, which must be contiguous. It may be the first of the tensors, but
// share memory with no other.
void combine_into(const Tensor& result, const std::vector<Tensor>& tensors,
                  const Tensor& coefficients);

// The three products of two rows of entries, summed up in double: x x, x y and y y.
void products(const float* x, const float* y, int64_t count, double* sums);

}  // namespace deepopt
