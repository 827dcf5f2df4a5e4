// Operators on the CPU that others are made of, and what they check.
#pragma once
#include <algorithm>
#include <initializer_list>

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

// Checks that a tensor is on the CPU and has these sizes and the dtype of `like`, and makes it
// contiguous.
inline void check_and_pack(Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> sizes,
                           const char* name) {
  const auto found = tensor.sizes();
  STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()) &&
                      tensor.scalar_type() == like.scalar_type() && tensor.is_cpu(),
                  "deepopt::", name,
                  ": tensors must be of one dtype, on the CPU, and of the shapes that the "
                  "operator's documentation says");
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
}

}  // namespace deepopt
