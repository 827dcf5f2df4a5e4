// deepopt::adamw_ on CUDA: what the operator asks of the kernels.
#pragma once
#include "../rules/adamw.h"
#include "../rules/rounding.h"
#include "tables.h"

namespace deepopt::cuda {

// What follows from a parameter's step count: given, or computed from a count on the device.
template <class S>
struct AtStep {
  S step_size, root_correction;
  const void* count;  // null: given
  uint32_t key;       // of stochastic rounding
};

struct Decay {
  double lr, beta1, beta2;
  Kind counts;  // dtype of the counts on the device
};

// Adds one to every count.
struct Counts {
  static constexpr int kMost = (kMostArgument - 64) / 8;
  void* at[kMost];
  int tensors = 0;
};

void count_up(const Counts& counts, Kind dtype, void* stream);

// The tensors of the table are parameter, gradient, m, v and low bits; the kinds are those of the
// first two. S is the type of the state, T a table of tensors or a strided one.
template <class S, class T>
void adamw(const T& table, const AdamW<S>& rule, const Decay& decay, Kind param, Kind grad,
           Rounding rounding, void* stream);

}  // namespace deepopt::cuda
