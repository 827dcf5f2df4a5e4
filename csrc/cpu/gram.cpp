// The running Gram matrices of the covariance memory on the CPU, in products of bfloat16 with
// float32 accumulation (symmetric.h).
#include "symmetric.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef DEEPOPT_AVX512_BF16
DEEPOPT_AVX512_BF16_BEGIN

namespace {

using namespace deepopt::bfloat16;

// Writes kept C + share K Kᵀ into `to`, for the packed rows of K. C and the result are size x size.
void average(
    const Panels& keys, int64_t size, const float* gram, float kept, float share, float* to) {
  const Rows<const float> old{gram, size, size};
  const Rows<float> out{to, size, size};
  symmetric_product(
      keys, keys, [&](int64_t, int64_t i, int64_t j, int64_t strip, const Tile& product) {
        const int64_t row = i * kPanel + strip, column = j * kPanel;
        out.store(row, column, added(kept, old.load(row, column), scaled(share, product)));
      });
  // The products cover the lower triangle; the rest is copied from across the diagonal.
  over_triangle(keys.panels, [&](int64_t, int64_t i, int64_t j, int64_t strip) {
    const int64_t first = j * kPanel + strip, last = std::min((i + 1) * kPanel, size);
    for (int64_t row = first; row < std::min(first + kStrip, size); ++row) {
      const int64_t computed = (row / kHalf + 1) * kHalf;
      for (int64_t column = std::max(computed, i * kPanel); column < last; ++column) {
        to[row * size + column] = to[column * size + row];
      }
    }
  });
}

} // namespace

DEEPOPT_AVX512_BF16_END
#endif

namespace {

Tensor gram_average(
    Tensor gram, Tensor grad, Tensor scale, Tensor kept, double share, bool of_rows) {
  for (const Tensor& tensor : {gram, grad, scale, kept}) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(),
        "gram_average takes float32 tensors on the CPU");
  }
  STD_TORCH_CHECK(
      gram.dim() == 3 && grad.dim() == 3 && scale.dim() == 1 && kept.dim() == 1,
      "gram and grad must be stacks of matrices, scale and kept one number for each");
  const int64_t batch = grad.size(0), rows = grad.size(1), columns = grad.size(2);
  const int64_t size = of_rows ? rows : columns;
  STD_TORCH_CHECK(
      gram.size(0) == batch && gram.size(1) == size && gram.size(2) == size &&
          scale.size(0) == batch && kept.size(0) == batch,
      "gram must have the side of grad that it is of, and all must be as many");
  const Tensor old = torch::stable::contiguous(gram), fresh = torch::stable::contiguous(grad);
  const Tensor scales = torch::stable::contiguous(scale), keeps = torch::stable::contiguous(kept);
  Tensor to = torch::stable::empty_like(old);
#ifdef DEEPOPT_AVX512_BF16
  const auto *c = old.const_data_ptr<float>(), *g = fresh.const_data_ptr<float>();
  const auto *s = scales.const_data_ptr<float>(), *k = keeps.const_data_ptr<float>();
  auto* out = to.mutable_data_ptr<float>();
  const int64_t panels = panels_for(size), depth = panels_for(of_rows ? columns : rows);
  Scratch scratch(Scratch::panels_bytes(panels, depth) + 64);
  const Panels keys = scratch.panels(panels, depth);
  for (int64_t b = 0; b < batch; ++b) {
    pack_matrix(
        {g + b * rows * columns, rows, columns}, s[b], of_rows ? &keys : nullptr,
        of_rows ? nullptr : &keys);
    average(
        keys, size, c + b * size * size, k[b], static_cast<float>(share), out + b * size * size);
  }
#endif
  return to;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  if (!deepopt::has_bfloat16_products()) return;  // the reference stays
  m.impl("gram_average", TORCH_BOX(&gram_average));
}
