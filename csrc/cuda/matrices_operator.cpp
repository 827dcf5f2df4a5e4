// deepopt::combine, frobenius, row_products, resize, multi_scale_write, coordinate_mlp and its
// gradient on CUDA.
#include "../cpu/matrices.h"
#include "../cpu/multi_scale.h"
#include "../cpu/resize.h"

#include "matrices.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

Shape shape_of(const Matrices& x) { return {x.batch, x.rows, x.columns}; }

Tensor on_combine(std::vector<Tensor> tensors, Tensor coefficients) {
  STD_TORCH_CHECK(!tensors.empty(), "deepopt::combine: there must be at least one tensor");
  const Device device(tensors[0]);
  const auto sizes = tensors[0].sizes(), given = coefficients.sizes();
  STD_TORCH_CHECK(given.size() > 1 && given.size() <= sizes.size() + 1 &&
                      given[0] == int64_t(tensors.size()) &&
                      std::equal(given.begin() + 1, given.end(), sizes.begin()),
                  "deepopt::combine: coefficients must be of shape (tensors, B) or (tensors, B, m)");
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Float && device.has(coefficients),
                  "deepopt::combine: coefficients must be float32, on the tensors' device");
  const Tensor factors = torch::stable::contiguous(coefficients);
  const Tensor result = torch::stable::new_empty(tensors[0], sizes, ScalarType::Float);
  if (!result.numel()) return result;
  const int64_t rows = factors.numel() / given[0];
  std::vector<Matrices> kept;
  for (const Tensor& tensor : tensors) {
    const auto shape = tensor.sizes();
    STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()) &&
                        device.has(tensor) && kind_of(tensor) != Kind::f64,
                    "deepopt::combine: tensors must be of one shape, on one device, not of float64");
    kept.emplace_back(tensor);
  }
  Terms terms;
  terms.by_row = given.size() == 3;
  terms.onto = false;
  for (size_t k = 0; k < kept.size(); ++k) {
    terms.stacks[terms.count] = {kept[k].data(), kind_of(tensors[k]), kept[k].transposed};
    terms.coefficients[terms.count++] = factors.const_data_ptr<float>() + int64_t(k) * rows;
    if (terms.count == Terms::kMost || k + 1 == kept.size()) {
      combine(result.mutable_data_ptr<float>(), terms, shape_of(kept[0]), device.stream());
      terms.count = 0;
      terms.onto = true;
    }
  }
  device.check_launch();
  return result;
}

Tensor on_frobenius(Tensor matrices) {
  const Device device(matrices);
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Float && matrices.dim() == 3,
                  "deepopt::frobenius: matrices must be float32, of shape (B, m, n)");
  const Matrices x(matrices);
  const int64_t parts = parts_of(x.entries(), kSummed);
  const Tensor norms = torch::stable::new_empty(matrices, {x.batch}, ScalarType::Float);
  const Tensor partial =
      torch::stable::new_empty(matrices, {x.batch * parts}, ScalarType::Double);
  frobenius(norms.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(),
            static_cast<const float*>(x.data()), x.batch, x.entries(), device.stream());
  device.check_launch();
  return norms;
}

Tensor on_row_products(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(tensors.size() == 1 || tensors.size() == 2,
                  "deepopt::row_products: more than two tensors have no kernel");
  const Device device(tensors[0]);
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3 &&
                        device.has(tensor),
                    "deepopt::row_products: tensors must be float32, of shape (B, m, n), on one "
                    "device");
  }
  Matrices x(tensors[0]), y(tensors.back());
  STD_TORCH_CHECK(x.batch == y.batch && x.rows == y.rows && x.columns == y.columns,
                  "deepopt::row_products: tensors must have one shape");
  if (x.transposed != y.transposed) {  // rare: one of them is copied
    Matrices& turned = x.transposed ? x : y;
    turned = Matrices(torch::stable::contiguous(turned.kept));
  }
  const bool two = tensors.size() == 2;
  const Tensor result =
      torch::stable::new_empty(tensors[0], {two ? 3 : 1, x.batch, x.rows}, ScalarType::Float);
  row_products(result.mutable_data_ptr<float>(), static_cast<const float*>(x.data()),
               static_cast<const float*>(y.data()), two, x.transposed, shape_of(x),
               device.stream());
  device.check_launch();
  return result;
}

std::vector<Tensor> on_resize(std::vector<Tensor> updates, std::optional<Tensor> weight,
                              Tensor momentum, std::optional<Tensor> gain, Tensor grad, Tensor step,
                              std::optional<Tensor> grad_norm, std::optional<Tensor> row_moment,
                              std::optional<Tensor> row_weight, double beta1, double beta2,
                              double rms_cap, std::optional<double> update_rms) {
  ResizeTensors of(updates, weight, gain, grad_norm, row_moment, row_weight, beta1, beta2, rms_cap,
                   update_rms);
  const Device device(updates[0]);
  Resize& rule = of.rule;
  rule.products = of.read(on_row_products(updates), rule.rows * (weight ? 3 : 1));
  if (grad_norm) {
    rule.gradient = of.read(on_frobenius(grad));
    rule.momentum = of.read(on_frobenius(momentum));
    rule.step = of.read(device.has(step) ? step : torch::stable::to(step, grad.device(), true));
  }
  resize(rule, device.stream());
  device.check_launch();
  return of.results(on_combine(updates, of.factors));
}

std::tuple<Tensor, Tensor, Tensor> on_multi_scale_write(Tensor momentum, Tensor slow, Tensor grad,
                                                        Tensor step, double retention,
                                                        int64_t slow_chunk, double beta3) {
  const Device device(momentum);
  const MultiScaleTensors of(momentum, slow, grad, step, retention, slow_chunk, beta3);
  multi_scale_write(of.rule, device.stream());
  device.check_launch();
  return of.results();
}

// What both operators of the MLP are given, in one layout.
struct __attribute__((visibility("hidden"))) Given {  // as torch's Tensor is
  std::vector<Tensor> kept;
  const Device& device;
  Mlp mlp;

  Given(const Device& on, const Tensor& base, const Tensor& reach,
        const std::vector<Tensor>& features, const Tensor& scales, const Tensor& weights)
      : device(on) {
    mlp.count = int(features.size());
    STD_TORCH_CHECK(mlp.count > 0 && mlp.count <= kMostFeatures,
                    "deepopt::coordinate_mlp: more than 4 features have no kernel");
    STD_TORCH_CHECK(base.dim() == 3 && weights.dim() == 3 && weights.size(2) == mlp.count + 1,
                    "deepopt::coordinate_mlp: base must be of shape (B, m, n) and weights of shape "
                    "(B, units, features + 1)");
    mlp.batch = base.size(0);
    mlp.entries = base.size(1) * base.size(2);
    mlp.units = int(weights.size(1));
    mlp.base = pointer(base, mlp.batch * mlp.entries);
    for (int f = 0; f < mlp.count; ++f) {
      mlp.features[f] = pointer(features[f], mlp.batch * mlp.entries);
    }
    mlp.reach = pointer(reach, mlp.batch);
    mlp.scales = pointer(scales, mlp.batch * mlp.count);
    mlp.weights = pointer(weights, mlp.batch * mlp.units * (mlp.count + 1));
  }

  const float* pointer(const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count &&
                        device.has(tensor),
                    "deepopt::coordinate_mlp: tensors must be float32, of one shape and device");
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back().const_data_ptr<float>();
  }
};

Tensor on_coordinate_mlp(Tensor base, Tensor reach, std::vector<Tensor> features, Tensor scales,
                      Tensor weights) {
  const Device device(base);
  const Given given(device, base, reach, features, scales, weights);
  const Tensor result = torch::stable::new_empty(base, base.sizes(), ScalarType::Float);
  coordinate_mlp(result.mutable_data_ptr<float>(), given.mlp, device.stream());
  device.check_launch();
  return result;
}

Tensor on_coordinate_mlp_gradient(Tensor base, Tensor reach, std::vector<Tensor> features,
                               Tensor scales, Tensor weights, Tensor target, Tensor unit) {
  const Device device(base);
  Given given(device, base, reach, features, scales, weights);
  const Mlp& mlp = given.mlp;
  const float* aim = given.pointer(target, mlp.batch * mlp.entries);
  const float* units = given.pointer(unit, mlp.batch);
  const Tensor gradient = torch::stable::new_empty(weights, weights.sizes(), ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(
      weights, {weights.numel() * parts_of(mlp.entries, kMlpEntries)}, ScalarType::Double);
  coordinate_mlp_gradient(gradient.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(),
                          mlp, aim, units, device.stream());
  device.check_launch();
  return gradient;
}

}  // namespace
}  // namespace deepopt::cuda

DEEPOPT_CUDA_LIBRARY {
  m.impl("combine", TORCH_BOX(&deepopt::cuda::on_combine));
  m.impl("frobenius", TORCH_BOX(&deepopt::cuda::on_frobenius));
  m.impl("row_products", TORCH_BOX(&deepopt::cuda::on_row_products));
  m.impl("resize", TORCH_BOX(&deepopt::cuda::on_resize));
  m.impl("multi_scale_write", TORCH_BOX(&deepopt::cuda::on_multi_scale_write));
  m.impl("coordinate_mlp", TORCH_BOX(&deepopt::cuda::on_coordinate_mlp));
  m.impl("coordinate_mlp_gradient", TORCH_BOX(&deepopt::cuda::on_coordinate_mlp_gradient));
}
