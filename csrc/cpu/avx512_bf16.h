// How a part of a file is compiled for AVX512-BF16, whatever the rest is compiled for, and whether
// the processor at hand runs it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define DEEPOPT_AVX512_BF16 1
#if defined(__clang__)
// One string, as _Pragma takes no two.
// clang-format off
#define DEEPOPT_AVX512_BF16_BEGIN \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512bf16\"))), apply_to = function)")
// clang-format on
#define DEEPOPT_AVX512_BF16_END _Pragma("clang attribute pop")
#else
#define DEEPOPT_AVX512_BF16_BEGIN \
  _Pragma("GCC push_options")     \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512bf16\")")
#define DEEPOPT_AVX512_BF16_END _Pragma("GCC pop_options")
#endif
#endif

namespace deepopt {

// Whether the products of symmetric.h run here: the processor has their instruction, and not the
// faster one (AMX), which torch's own products use.
inline bool has_bfloat16_products() {
#ifdef DEEPOPT_AVX512_BF16
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && !__builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace deepopt
