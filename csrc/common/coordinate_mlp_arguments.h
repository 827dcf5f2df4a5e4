// What the operators of the coordinate MLP, on the CPU and on CUDA, are given.
#pragma once
#include "../rules/coordinate_mlp.h"
#include "multi_tensor.h"

namespace deepopt {

struct DEEPOPT_HIDDEN CoordinateMlpArguments {
  CoordinateMlp mlp{};

  CoordinateMlpArguments(const Tensor& base, const Tensor& reach,
                         const std::vector<Tensor>& features, const Tensor& scales,
                         const Tensor& weights)
      : like_(base) {
    const auto count = int64_t(features.size());
    STD_TORCH_CHECK(count > 0 && count <= CoordinateMlp::kMostFeatures,
                    "deepopt::coordinate_mlp: more than 4 features have no kernel");
    STD_TORCH_CHECK(base.dim() == 3 && weights.dim() == 3 && weights.size(2) == count + 1,
                    "deepopt::coordinate_mlp: base must be of shape (B, m, n) and weights of shape "
                    "(B, units, features + 1)");
    mlp.count = int(count), mlp.units = int(weights.size(1));
    mlp.batch = base.size(0), mlp.entries = base.size(1) * base.size(2);
    mlp.base = read(base, mlp.batch * mlp.entries);
    mlp.reach = read(reach, mlp.batch);
    mlp.scales = read(scales, mlp.batch * count);
    mlp.weights = read(weights, mlp.batch * mlp.units * (count + 1));
    for (int f = 0; f < mlp.count; ++f) {
      mlp.features[f] = read(features[f], mlp.batch * mlp.entries);
    }
  }

  // The address of `count` numbers, which stay alive for as long as this struct.
  const float* read(const Tensor& tensor, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count &&
                        tensor.device() == like_.device(),
                    "deepopt::coordinate_mlp: tensors must be float32, of one shape and device");
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr<float>();
  }

 private:
  Tensor like_;
  std::vector<Tensor> kept_;
};

}  // namespace deepopt
