// The loop over the entries of one stretch of a parameter and its other tensors.
#pragma once
#include "../common/roundings.h"

namespace deepopt {

// Calls entry(addresses of the N entries, place) for each: `place` is what stochastic rounding
// draws from. kWidths are the bytes of an entry of each tensor. Where every tensor lies entry after
// entry, the distances are constants, and the compiler makes a loop over vectors.
template <size_t... kWidths, class Entry>
inline __attribute__((always_inline)) void for_entries(const Places<sizeof...(kWidths)>& at,
                                                       const Noise& noise, const Entry& entry) {
  constexpr size_t N = sizeof...(kWidths);
  constexpr std::array<int64_t, N> kDense{int64_t(kWidths)...};
  const std::array<char*, N> base = at.at;
  const std::array<int64_t, N> stride = at.stride;
  const uint32_t place = noise.place(base[0]);
  if (stride == kDense) {
#pragma GCC ivdep
    for (int64_t i = 0; i < at.count; ++i) {
      std::array<char*, N> here;
      for (size_t k = 0; k < N; ++k) here[k] = base[k] + i * kDense[k];
      entry(here, place + uint32_t(i));
    }
  } else {
    for (int64_t i = 0; i < at.count; ++i) {
      std::array<char*, N> here;
      for (size_t k = 0; k < N; ++k) here[k] = base[k] + i * stride[k];
      entry(here, noise.place(here[0]));
    }
  }
}

}  // namespace deepopt
