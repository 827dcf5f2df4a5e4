// Which version of a kernel this processor runs, where a file compiles one for every level.
#pragma once
#include "../common/multi_tensor.h"

namespace deepopt {

// 4 or 3 for that level of x86-64, 0 for what the compiler was told to build for.
inline int processor_level() {
#if defined(DEEPOPT_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 0;
}

}  // namespace deepopt
