// Reads one entry beyond a tensor: what the sanitizer must see, or it sees nothing.
#include "../../csrc/common/multi_tensor.h"

namespace {

double beyond(torch::stable::Tensor tensor) {
  return tensor.const_data_ptr<float>()[tensor.numel()];
}

}  // namespace

STABLE_TORCH_LIBRARY(deepopt_planted, m) { m.def("beyond(Tensor tensor) -> float"); }
STABLE_TORCH_LIBRARY_IMPL(deepopt_planted, CPU, m) { m.impl("beyond", TORCH_BOX(&beyond)); }
