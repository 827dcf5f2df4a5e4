// Operators that others are made of.
#pragma once
#include "matrices.h"

namespace deepopt {

Tensor frobenius(Tensor matrices);
Tensor row_products(std::vector<Tensor> tensors);
Tensor combine(std::vector<Tensor> tensors, Tensor coefficients);

}  // namespace deepopt
