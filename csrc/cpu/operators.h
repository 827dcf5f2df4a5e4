// Operators that others are made of.
#pragma once
#include "../common/matrices.h"

namespace deepopt {

Tensor frobenius(Tensor matrices);
Tensor row_products(std::vector<Tensor> tensors);
Tensor combine(std::vector<Tensor> tensors, Tensor coefficients);
// The same in memory that is there: contiguous, and the first tensor's or none of theirs.
void combine_into(const Tensor& result, const std::vector<Tensor>& tensors,
                  const Tensor& coefficients);

}  // namespace deepopt
