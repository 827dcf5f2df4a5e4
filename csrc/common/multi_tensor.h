// How a rule runs over lists of tensors. The entries are cut into chunks, which the threads share.
// A chunk is one loop over entries that lie one after the other, or a walk by strides where they do
// not.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

// Compiles a function once for every level of x86-64; the processor's is chosen when the library is
// loaded. The address sanitizer gets one version: its runtime does not run yet when the choice is
// made.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define DEEPOPT_LEVELS 1
#define DEEPOPT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define DEEPOPT_CLONES __attribute__((noinline))
#endif

// For structs that hold a Tensor. torch keeps Tensor out of a library's symbols, and a struct that
// holds one must not be more visible than it.
#define DEEPOPT_HIDDEN __attribute__((visibility("hidden")))

namespace deepopt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

constexpr int64_t kChunk =
    1 << 13;  // entries: long enough to hide a call, short enough to share out
constexpr int64_t kWorth = 4 * kChunk;  // entries that are worth a thread, as in torch

// A stretch of entries of N tensors of one shape: the address of the first in each, and the
// distance from one to the next.
template <size_t N>
struct Places {
  std::array<char*, N> at;
  std::array<int64_t, N> stride;  // in bytes
  int64_t count;
};

// Where the entries of a tensor are. Every question to a tensor crosses the stable ABI: this asks
// each of them once.
struct View {
  char* data;
  int64_t width;  // bytes of an entry
  size_t dims;
  const int64_t *sizes, *strides;  // in entries

  explicit View(const Tensor& tensor)
      : data(static_cast<char*>(tensor.mutable_data_ptr())),
        width(int64_t(tensor.element_size())) {
    const auto size = tensor.sizes(), stride = tensor.strides();
    dims = size.size(), sizes = size.data(), strides = stride.data();
  }
};

inline void check_same_shape(const View& view, const View& param) {
  STD_TORCH_CHECK(std::equal(view.sizes, view.sizes + view.dims, param.sizes,
                             param.sizes + param.dims),
                  "deepopt: tensors of one parameter must have its shape");
}

// Refuses, as torch does, to write to a place that several entries share.
inline void check_written(const View& view) {
  for (size_t d = 0; d < view.dims; ++d) {
    STD_TORCH_CHECK(view.sizes[d] < 2 || view.strides[d] != 0,
                    "deepopt: a tensor that is written to has several entries in one place, as "
                    "expand makes it; clone it first");
  }
}

// N tensors of one shape. Neighboring dimensions are merged where every tensor continues evenly
// from one to the next, so that most walks have a single long dimension.
template <size_t N>
class Walk {
 public:
  static constexpr size_t kMostDims = 16;
  struct Dim {
    int64_t size;
    std::array<int64_t, N> stride;

    bool continues(const Dim& inner) const {
      for (size_t k = 0; k < N; ++k) {
        if (stride[k] != inner.size * inner.stride[k]) return false;
      }
      return true;
    }
  };

  explicit Walk(const std::array<View, N>& views) {
    for (size_t k = 0; k < N; ++k) {
      base_[k] = views[k].data;
      width_[k] = views[k].width;
    }
    std::array<Dim, kMostDims> dims;
    size_t used = 0;
    count_ = 1;
    for (size_t d = 0; d < views[0].dims; ++d) {
      const int64_t size = views[0].sizes[d];
      count_ *= size;
      if (size == 1) continue;
      STD_TORCH_CHECK(used < kMostDims, "deepopt: a parameter has more than 16 dimensions");
      Dim& dim = dims[used++];
      dim.size = size;
      for (size_t k = 0; k < N; ++k) dim.stride[k] = views[k].strides[d] * views[k].width;
    }
    // The walk follows the memory order of the first tensor, the parameter.
    std::stable_sort(dims.begin(), dims.begin() + used,
                     [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
    inner_.size = count_;
    for (size_t k = 0; k < N; ++k) inner_.stride[k] = views[k].width;
    for (size_t d = 0; d < used; ++d) {
      const bool merged = d && inner_.continues(dims[d]);
      if (d && !merged) outer_.push_back(inner_);
      inner_ = Dim{merged ? inner_.size * dims[d].size : dims[d].size, dims[d].stride};
    }
  }

  int64_t count() const { return count_; }
  const std::array<char*, N>& base() const { return base_; }
  size_t dims() const { return outer_.size() + 1; }
  const Dim& dim(size_t d) const { return d < outer_.size() ? outer_[d] : inner_; }

  // Whether all entries of all tensors lie one after the other, in the same order.
  bool dense() const { return outer_.empty() && inner_.stride == width_; }

  // Calls f with stretches of entries that together are those from begin to end, in the walk's
  // order.
  template <class F>
  void between(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t left = inner_.size - begin % inner_.size;
      Places<N> places{base_, inner_.stride, std::min(end - begin, left)};
      int64_t index = begin;
      for (size_t d = dims(); d-- > 0;) {
        const int64_t along = index % dim(d).size;
        index /= dim(d).size;
        for (size_t k = 0; k < N; ++k) places.at[k] += along * dim(d).stride[k];
      }
      f(places);
      begin += places.count;
    }
  }

 private:
  std::array<char*, N> base_;
  std::array<int64_t, N> width_;
  Dim inner_;
  std::vector<Dim> outer_;  // seldom any: room for 16 in every walk would flood the cache
  int64_t count_;
};

// Calls f(tensor, begin, end) for chunks of all tensors, in parallel.
template <size_t N, class F>
void for_chunks(const std::vector<Walk<N>>& walks, const F& f) {
  std::vector<int64_t> first{0};  // chunk of each tensor
  for (const auto& walk : walks) {
    first.push_back(first.back() + (walk.count() + kChunk - 1) / kChunk);
  }
  int64_t entries = 0;
  for (const auto& walk : walks) entries += walk.count();
  // Eight small tensors are worth a thread: handling them costs more than their entries do.
  const int64_t grain = entries < first.back() * (kChunk / 2) ? 8 : kWorth / kChunk;
  torch::stable::parallel_for(0, first.back(), grain, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= first[t + 1]) ++t;
      const int64_t from = (c - first[t]) * kChunk;
      f(t, from, std::min(from + kChunk, walks[t].count()));
    }
  });
}

}  // namespace deepopt
