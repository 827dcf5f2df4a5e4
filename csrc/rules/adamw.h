// AdamW (Loshchilov & Hutter 2019), entry by entry, in torch's order of operations:
//
//   m <- m + (1 - b1) (g - m)
//   v <- b2 v + (1 - b2) g^2
//   p <- (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
#pragma once
#include "rule.h"

namespace deepopt {

template <class T>
struct AdamW {
  T sign, decay, first, second_kept, second, eps;  // the same for all tensors
  T step_size, root_correction;                    // from a tensor's step count

  AdamW(double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize)
      : sign(maximize ? T(-1) : T(1)),
        decay(T(1 - lr * weight_decay)),
        first(T(1 - beta1)),
        second_kept(T(beta2)),
        second(T(1 - beta2)),
        eps(T(eps)) {}

  DEEPOPT_RULE void at_step(double lr, double beta1, double beta2, double step) {
    step_size = T(-lr / (1 - std::pow(beta1, step)));
    root_correction = T(std::sqrt(1 - std::pow(beta2, step)));
  }

  DEEPOPT_RULE void operator()(T& p, T g, T& m, T& v) const {
    g *= sign;
    m = lerp(m, g, first);
    v = fma_(second * g, g, second_kept * v);
    p = decay * p + step_size * m / (sqrt_(v) / root_correction + eps);
  }
};

}  // namespace deepopt
