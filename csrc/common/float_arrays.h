// The arrays of a rule: addresses of tensors, which stay alive for as long as this object.
#pragma once
#include "multi_tensor.h"

namespace deepopt {

class DEEPOPT_HIDDEN FloatArrays {
 public:
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  // All tensors must be on like's device; `wrong` is the message for one that does not fit.
  FloatArrays(const Tensor& like, const char* wrong) : like_(like), wrong_(wrong) {}

  // The numbers of a float32 tensor of these sizes, one after the other.
  const float* read(const Tensor& tensor, Sizes sizes) {
    const auto own = tensor.sizes();
    return keep(tensor, std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()));
  }

  // The same for a tensor with this many numbers, of any shape.
  const float* read_count(const Tensor& tensor, int64_t count) {
    return keep(tensor, tensor.numel() == count);
  }

  // A result, not yet written.
  float* make(Sizes sizes) {
    made_.push_back(torch::stable::new_empty(like_, sizes, ScalarType::Float));
    return made_.back().mutable_data_ptr<float>();
  }

  // In the order in which they were made.
  const std::vector<Tensor>& results() const { return made_; }

 private:
  Tensor like_;
  const char* wrong_;
  std::vector<Tensor> kept_, made_;

  const float* keep(const Tensor& tensor, bool fits) {
    STD_TORCH_CHECK(fits && tensor.scalar_type() == ScalarType::Float &&
                        tensor.device() == like_.device(),
                    wrong_);
    kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr<float>();
  }
};

}  // namespace deepopt
