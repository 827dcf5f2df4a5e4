// The side of the CUDA operators that knows torch: device, stream, errors, and how tables are
// filled.
#pragma once
#include "../common/roundings.h"
#include "tables.h"

#if defined(DEEPOPT_EMULATED)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define DEEPOPT_CUDA_LIBRARY STABLE_TORCH_LIBRARY_IMPL(deepopt, CUDA, m)
#endif

namespace deepopt::cuda {

#if !defined(DEEPOPT_EMULATED)
// Makes a tensor's device the current one while it lives; kernels go to the stream that torch uses.
class DEEPOPT_HIDDEN Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  void* stream() const { return stream_; }
  bool has(const Tensor& tensor) const {
    return tensor.is_cuda() && tensor.get_device_index() == index_;
  }
  void check_launch() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Double: return Kind::f64;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Half: return Kind::fp16;
    default: STD_TORCH_CHECK(false, "deepopt: a tensor's dtype has no kernel");
  }
}

// The walk that a kernel takes through tensors that do not lie alike.
template <int N, class Own>
Strided<N, Own> strided(const Walk<size_t(N)>& walk, const Own& own) {
  Strided<N, Own> table;
  std::copy(walk.base().begin(), walk.base().end(), table.at);
  table.entries = walk.count();
  table.own = own;
  table.dims = int(walk.dims());
  for (int d = 0; d < table.dims; ++d) {
    table.size[d] = walk.dim(d).size;
    std::copy(walk.dim(d).stride.begin(), walk.dim(d).stride.end(), table.stride[d]);
  }
  return table;
}

// All parameters of a table share their dtypes and rounding.
struct Dtypes {
  Kind param, other;
  Rounding rounding;
  auto operator<=>(const Dtypes&) const = default;
};

// Calls go(table, dtypes) for all parameters of a list: for as many at a time as a table holds, and
// one by one for those that have to be walked by strides.
template <int N, class Own, class Go>
void in_tables(const std::vector<Walk<size_t(N)>>& walks, const std::vector<Own>& own,
               const std::vector<Dtypes>& dtypes, const Go& go) {
  std::vector<size_t> order;
  for (size_t i = 0; i < walks.size(); ++i) {
    if (!walks[i].count()) continue;
    if (walks[i].dense()) {
      order.push_back(i);
    } else {
      go(strided<N>(walks[i], own[i]), dtypes[i]);
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return dtypes[a] < dtypes[b]; });
  Table<N, Own> table;
  for (size_t k = 0; k < order.size(); ++k) {
    const size_t i = order[k];
    table.add(walks[i].base().data(), walks[i].count(), own[i]);
    if (table.full() || k + 1 == order.size() || dtypes[order[k + 1]] != dtypes[i]) {
      go(table, dtypes[i]);
      table.tensors = 0;
    }
  }
}

}  // namespace deepopt::cuda
