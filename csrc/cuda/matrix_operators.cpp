// deepopt::combine, frobenius, row_products, scale_update, multi_scale_write, horizons_write,
// coordinate_mlp and its gradient on CUDA.
#include "../common/coordinate_mlp_arguments.h"
#include "../common/horizons_arguments.h"
#include "../common/matrix_arguments.h"
#include "../common/multi_scale_arguments.h"
#include "../common/scale_update_arguments.h"

#include "matrix_kernels.h"
#include "operator.h"

namespace deepopt::cuda {
namespace {

Shape shape_of(const Matrices& x) { return {x.batch, x.rows, x.columns}; }

Tensor on_combine(std::vector<Tensor> tensors, Tensor coefficients) {
  const CombineArguments given(tensors, coefficients);
  const Device device(tensors[0]);
  STD_TORCH_CHECK(device.has(given.factors), "deepopt::combine: tensors must be on one device");
  const Tensor result = torch::stable::new_empty(tensors[0], tensors[0].sizes(), ScalarType::Float);
  if (!result.numel()) return result;
  Terms terms;
  terms.by_row = given.by_row;
  terms.onto = false;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const Matrices& x = given.terms[k];
    terms.stacks[terms.count] = {x.data(), kind_of(tensors[k]), x.transposed};
    terms.coefficients[terms.count++] = given.coefficients(k);
    if (terms.count == Terms::kMost || k + 1 == tensors.size()) {
      combine(result.mutable_data_ptr<float>(), terms, shape_of(x), device.stream());
      terms.count = 0;
      terms.onto = true;
    }
  }
  device.check_launch();
  return result;
}

Tensor on_frobenius(Tensor matrices) {
  const Device device(matrices);
  const Matrices x = frobenius_argument(matrices);
  const int64_t parts = parts_of(x.entries(), kSummed);
  const Tensor norms = torch::stable::new_empty(matrices, {x.batch}, ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(matrices, {x.batch * parts}, ScalarType::Double);
  frobenius(norms.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(),
            static_cast<const float*>(x.data()), x.batch, x.entries(), device.stream());
  device.check_launch();
  return norms;
}

Tensor on_row_products(std::vector<Tensor> tensors) {
  const RowProductsArguments given(tensors);
  const Matrices &x = given.x, &y = given.y;
  const Device device(tensors[0]);
  const Tensor result =
      torch::stable::new_empty(tensors[0], {given.two ? 3 : 1, x.batch, x.rows}, ScalarType::Float);
  row_products(result.mutable_data_ptr<float>(), static_cast<const float*>(x.data()),
               static_cast<const float*>(y.data()), given.two, x.transposed, shape_of(x),
               device.stream());
  device.check_launch();
  return result;
}

std::vector<Tensor> on_scale_update(const std::vector<Tensor>& updates,
                                    const ScaleArguments& given) {
  ScaleUpdateTensors made(updates, given);
  const Device device(updates[0]);
  ScaleUpdate& rule = made.rule;
  rule.products = made.read(on_row_products(updates), rule.rows * (given.weight ? 3 : 1));
  if (given.grad_norm) {
    rule.gradient = made.read(on_frobenius(given.grad));
    rule.momentum = made.read(on_frobenius(given.momentum));
    const Tensor& step = given.step;
    rule.step =
        made.read(device.has(step) ? step : torch::stable::to(step, given.grad.device(), true));
  }
  scale_update(rule, device.stream());
  device.check_launch();
  return made.results(on_combine(updates, made.factors));
}

std::tuple<Tensor, Tensor, Tensor> on_multi_scale_write(Tensor momentum, Tensor slow, Tensor grad,
                                                        Tensor step, double retention,
                                                        int64_t slow_chunk, double beta3) {
  const Device device(momentum);
  const MultiScaleArguments given(momentum, slow, grad, step, retention, slow_chunk, beta3);
  multi_scale_write(given.rule, device.stream());
  device.check_launch();
  return given.results();
}

std::vector<Tensor> on_horizons_write(std::vector<Tensor> averages, Tensor grad, Tensor foresight,
                                      Tensor grad_size, Tensor phi, Tensor step,
                                      std::vector<double> retentions) {
  const Device device(grad);
  const HorizonsArguments given(averages, grad, foresight, grad_size, phi, step, retentions);
  const Horizons& rule = given.rule;
  const int64_t parts = rule.batch * parts_of(rule.entries, kSummed);
  const Tensor partial =
      torch::stable::new_empty(grad, {parts * rule.sums()}, ScalarType::Double);
  constexpr int64_t kFloats = sizeof(Horizons::Shares) / sizeof(float);
  const Tensor shares = torch::stable::new_empty(grad, {rule.batch * kFloats}, ScalarType::Float);
  horizons_write(rule, partial.mutable_data_ptr<double>(),
                 reinterpret_cast<Horizons::Shares*>(shares.mutable_data_ptr<float>()),
                 device.stream());
  device.check_launch();
  return given.results();
}

Tensor on_coordinate_mlp(Tensor base, Tensor reach, std::vector<Tensor> features, Tensor scales,
                         Tensor weights) {
  const Device device(base);
  const CoordinateMlpArguments given(base, reach, features, scales, weights);
  const Tensor result = torch::stable::new_empty(base, base.sizes(), ScalarType::Float);
  coordinate_mlp(result.mutable_data_ptr<float>(), given.mlp, device.stream());
  device.check_launch();
  return result;
}

Tensor on_coordinate_mlp_gradient(Tensor base, Tensor reach, std::vector<Tensor> features,
                                  Tensor scales, Tensor weights, Tensor target, Tensor unit) {
  const Device device(base);
  CoordinateMlpArguments given(base, reach, features, scales, weights);
  const CoordinateMlp& mlp = given.mlp;
  const float* aim = given.arrays.read_count(target, mlp.batch * mlp.entries);
  const float* units = given.arrays.read_count(unit, mlp.batch);
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
  m.impl("scale_update",
         &deepopt::boxed<&deepopt::cuda::on_scale_update, std::vector<torch::stable::Tensor>,
                         deepopt::ScaleArguments>);
  m.impl("multi_scale_write", TORCH_BOX(&deepopt::cuda::on_multi_scale_write));
  m.impl("horizons_write", TORCH_BOX(&deepopt::cuda::on_horizons_write));
  m.impl("coordinate_mlp", TORCH_BOX(&deepopt::cuda::on_coordinate_mlp));
  m.impl("coordinate_mlp_gradient", TORCH_BOX(&deepopt::cuda::on_coordinate_mlp_gradient));
}
