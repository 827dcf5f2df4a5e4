// The checks of deepopt::combine and deepopt::row_products that the launchers for CPU and CUDA
// share.
#pragma once
#include "matrices.h"

namespace deepopt {

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto own = a.sizes(), other = b.sizes();
  return std::equal(own.begin(), own.end(), other.begin(), other.end());
}

// The terms of a sum of stacks, with their coefficients: one for each matrix, or for each row.
struct DEEPOPT_HIDDEN CombineArguments {
  std::vector<Matrices> terms;
  Tensor factors;
  int64_t rows;  // that share a coefficient, or matrices
  bool by_row;

  CombineArguments(const std::vector<Tensor>& tensors, const Tensor& coefficients) {
    STD_TORCH_CHECK(!tensors.empty(), "deepopt::combine: there must be at least one tensor");
    const auto sizes = tensors[0].sizes(), given = coefficients.sizes();
    STD_TORCH_CHECK(
        given.size() > 1 && given.size() <= std::min<size_t>(3, sizes.size() + 1) &&
            given[0] == int64_t(tensors.size()) &&
            std::equal(given.begin() + 1, given.end(), sizes.begin()),
        "deepopt::combine: coefficients must be of shape (tensors, B) or (tensors, B, m)");
    STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float &&
                        coefficients.device() == tensors[0].device(),
                    "deepopt::combine: coefficients must be float32, on the tensors' one device");
    factors = torch::stable::contiguous(coefficients);
    rows = factors.numel() / given[0];
    by_row = given.size() == 3;
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(
          same_sizes(tensor, tensors[0]) && tensor.device() == tensors[0].device() &&
              tensor.scalar_type() != ScalarType::Double,
          "deepopt::combine: tensors must be of one shape, on one device, not of float64");
      terms.emplace_back(tensor);
    }
  }

  const float* coefficients(size_t term) const {
    return factors.const_data_ptr<float>() + int64_t(term) * rows;
  }
};

// One stack, or two of one shape that lie alike: row after row, or column after column.
struct DEEPOPT_HIDDEN RowProductsArguments {
  Matrices x, y;  // the same one twice where there is one
  bool two;

  explicit RowProductsArguments(const std::vector<Tensor>& tensors)
      : x(checked(tensors).front()), y(tensors.back()), two(tensors.size() == 2) {
    if (x.transposed == y.transposed) return;
    Matrices& turned = x.transposed ? x : y;  // rare: one of them is copied
    turned = Matrices(torch::stable::contiguous(turned.kept));
  }

 private:
  static const std::vector<Tensor>& checked(const std::vector<Tensor>& tensors) {
    STD_TORCH_CHECK(tensors.size() == 1 || tensors.size() == 2,
                    "deepopt::row_products: more than two tensors have no kernel");
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(
          tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3 &&
              same_sizes(tensor, tensors[0]) && tensor.device() == tensors[0].device(),
          "deepopt::row_products: tensors must be float32, of one shape (B, m, n), on one "
          "device");
    }
    return tensors;
  }
};

inline Matrices frobenius_argument(const Tensor& matrices) {
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Float && matrices.dim() == 3,
                  "deepopt::frobenius: matrices must be float32, of shape (B, m, n)");
  return Matrices(matrices);
}

}  // namespace deepopt
