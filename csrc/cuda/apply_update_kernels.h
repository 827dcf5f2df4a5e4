// deepopt::apply_update_ on CUDA: what the operator asks of the kernels.
#pragma once
#include "../rules/apply_update.h"
#include "../rules/rounding.h"
#include "tables.h"

namespace deepopt::cuda {

// The tensors of the table are parameter, update and low bits, and its own numbers the keys of
// stochastic rounding. T is a table of tensors or a strided one, S the type that the rule computes
// in.
template <class S, class T>
void apply_update(const T& table, const ApplyUpdate<S>& rule, Kind param, Rounding rounding,
                  void* stream);

}  // namespace deepopt::cuda
