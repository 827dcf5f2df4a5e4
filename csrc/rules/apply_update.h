// The write to a parameter, with decoupled weight decay: p <- (1 - lr wd) p - lr u
#pragma once
#include "rule.h"

namespace deepopt {

template <class T>
struct ApplyUpdate {
  T decay, lr;

  ApplyUpdate(double lr, double weight_decay) : decay(T(1 - lr * weight_decay)), lr(T(lr)) {}

  DEEPOPT_RULE T operator()(T p, T u) const { return decay * p - lr * u; }
};

}  // namespace deepopt
