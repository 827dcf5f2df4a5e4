// deepopt::apply_update_ on CUDA: what the operator asks of the kernels.
#pragma once
#include "../rules/apply_update.h"
#include "../rules/rounding.h"
#include "tables.h"

namespace deepopt::cuda {

// Parameter, update and low bits; T: a table of tensors or a strided one, with the keys of stochastic
// rounding. S: what it is computed in.
template <class S, class T>
void apply_update(const T& table, const ApplyUpdate<S>& rule, Kind param, Rounding rounding, void* stream);

}  // namespace deepopt::cuda
