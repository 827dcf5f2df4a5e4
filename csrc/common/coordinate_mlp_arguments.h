// What the operators of the coordinate MLP, on the CPU and on CUDA, are given.
#pragma once
#include "../rules/coordinate_mlp.h"
#include "float_arrays.h"

namespace deepopt {

struct DEEPOPT_HIDDEN CoordinateMlpArguments {
  CoordinateMlp mlp{};
  FloatArrays arrays;

  CoordinateMlpArguments(const Tensor& base, const Tensor& reach,
                         const std::vector<Tensor>& features, const Tensor& scales,
                         const Tensor& weights)
      : arrays(base,
               "deepopt::coordinate_mlp: tensors must be float32, of one shape and device") {
    const auto count = int64_t(features.size());
    STD_TORCH_CHECK(count > 0 && count <= CoordinateMlp::kMostFeatures,
                    "deepopt::coordinate_mlp: more than 4 features have no kernel");
    STD_TORCH_CHECK(base.dim() == 3 && weights.dim() == 3 && weights.size(2) == count + 1,
                    "deepopt::coordinate_mlp: base must be of shape (B, m, n) and weights of shape "
                    "(B, units, features + 1)");
    mlp.count = int(count), mlp.units = int(weights.size(1));
    mlp.batch = base.size(0), mlp.entries = base.size(1) * base.size(2);
    mlp.base = arrays.read_count(base, mlp.batch * mlp.entries);
    mlp.reach = arrays.read_count(reach, mlp.batch);
    mlp.scales = arrays.read_count(scales, mlp.batch * count);
    mlp.weights = arrays.read_count(weights, mlp.batch * mlp.units * (count + 1));
    for (int f = 0; f < mlp.count; ++f) {
      mlp.features[f] = arrays.read_count(features[f], mlp.batch * mlp.entries);
    }
  }
};

}  // namespace deepopt
