// deepopt::causal_conv and deepopt::causal_conv_gradient on the CPU, channel by channel.
//
// All sequences share a channel's weights. A thread takes a channel with all sequences, so that it
// alone adds to the gradient of those weights, always in the same order.
#include "../common/multi_tensor.h"
#include "operators.h"

#include <cstring>
#include <tuple>

namespace deepopt {
namespace {

constexpr int64_t kChannels = 8;  // at least so many for a thread

// out_j = sum_i weight_i in_{j + i}
template <class T>
inline __attribute__((always_inline)) void convolve(T* out, const T* in, const T* weight,
                                                    int64_t width, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = weight[0] * in[j];
  for (int64_t i = 1; i < width; ++i) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) out[j] += weight[i] * in[j + i];
  }
}

// The gradients: d_in_k = sum_i weight_i grad_{k - i}, and d_weight_i += sum_j grad_j in_{j + i}.
template <class T>
inline __attribute__((always_inline)) void convolve_back(T* d_in, T* d_weight, const T* grad,
                                                         const T* in, const T* weight,
                                                         int64_t width, int64_t count) {
  typedef T Lanes __attribute__((vector_size(64)));
  constexpr int64_t kLanes = 64 / sizeof(T);
  std::fill_n(d_in, count + width - 1, T(0));
  for (int64_t i = 0; i < width; ++i) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) d_in[j + i] += weight[i] * grad[j];
    Lanes lanes = {};
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      Lanes a, b;
      memcpy(&a, grad + j, sizeof a);
      memcpy(&b, in + i + j, sizeof b);
      lanes += a * b;
    }
    T sum = 0;
    for (; j < count; ++j) sum += grad[j] * in[i + j];
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    d_weight[i] += sum;
  }
}

#define ROW(T)                                                                             \
  DEEPOPT_CLONES void row(T* out, const T* in, const T* weight, int64_t width,             \
                          int64_t count) {                                                 \
    convolve(out, in, weight, width, count);                                               \
  }                                                                                        \
  DEEPOPT_CLONES void row_back(T* d_in, T* d_weight, const T* grad, const T* in,           \
                               const T* weight, int64_t width, int64_t count) {            \
    convolve_back(d_in, d_weight, grad, in, weight, width, count);                         \
  }
ROW(float)
ROW(double)
#undef ROW

struct Sizes {
  int64_t batch, channels, width, count;

  Sizes(const Tensor& padded, const Tensor& weight) {
    STD_TORCH_CHECK(padded.dim() == 3 && weight.dim() == 2 && weight.size(1) >= 1 &&
                        padded.size(2) + 1 >= weight.size(1),
                    "deepopt::causal_conv: padded must be (batch, channels, tokens + width - 1), "
                    "weight (channels, width)");
    batch = padded.size(0), channels = padded.size(1);
    width = weight.size(1), count = padded.size(2) - width + 1;
  }
};

template <class F>
auto for_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "deepopt::causal_conv: float32 or float64");
  return f(float());
}

Tensor causal_conv(Tensor padded, Tensor weight) {
  const Sizes s(padded, weight);
  check_and_pack(padded, padded, {s.batch, s.channels, s.count + s.width - 1}, "causal_conv");
  check_and_pack(weight, padded, {s.channels, s.width}, "causal_conv");
  Tensor made = torch::stable::empty({s.batch, s.channels, s.count}, padded.scalar_type());
  for_dtype(padded, [&](auto number) {
    using T = decltype(number);
    const T *in = padded.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* out = made.mutable_data_ptr<T>();
    const int64_t length = s.count + s.width - 1;
    torch::stable::parallel_for(0, s.channels, kChannels, [&](int64_t first, int64_t last) {
      for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t c = first; c < last; ++c) {
          const int64_t at = b * s.channels + c;
          row(out + at * s.count, in + at * length, w + c * s.width, s.width, s.count);
        }
      }
    });
  });
  return made;
}

std::tuple<Tensor, Tensor> causal_conv_gradient(Tensor grad, Tensor padded, Tensor weight) {
  const Sizes s(padded, weight);
  const char* name = "causal_conv_gradient";
  check_and_pack(padded, padded, {s.batch, s.channels, s.count + s.width - 1}, name);
  check_and_pack(weight, padded, {s.channels, s.width}, name);
  check_and_pack(grad, padded, {s.batch, s.channels, s.count}, name);
  Tensor d_padded = torch::stable::empty_like(padded);
  Tensor d_weight = torch::stable::empty_like(weight);
  for_dtype(padded, [&](auto number) {
    using T = decltype(number);
    const T *in = padded.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    const T* g = grad.const_data_ptr<T>();
    T *d_in = d_padded.mutable_data_ptr<T>(), *d_w = d_weight.mutable_data_ptr<T>();
    const int64_t length = s.count + s.width - 1;
    std::fill_n(d_w, s.channels * s.width, T(0));
    torch::stable::parallel_for(0, s.channels, kChannels, [&](int64_t first, int64_t last) {
      for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t c = first; c < last; ++c) {
          const int64_t at = b * s.channels + c;
          row_back(d_in + at * length, d_w + c * s.width, g + at * s.count, in + at * length,
                   w + c * s.width, s.width, s.count);
        }
      }
    });
  });
  return {d_padded, d_weight};
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("causal_conv", TORCH_BOX(&deepopt::causal_conv));
  m.impl("causal_conv_gradient", TORCH_BOX(&deepopt::causal_conv_gradient));
}
