#include "apply_update_kernels.h"

#include "parameter.cuh"

namespace deepopt::cuda {
namespace {

template <Rounding R, class P, class S>
__device__ __forceinline__ void apply_to_entry(const ApplyUpdate<S>& rule, P& p, const S& u,
                                               uint16_t& low, uint32_t key, uint32_t place) {
  store_rounded<R>(rule(to_fp32<R>(p, low), u), p, low, key, place);
}

template <class P, class S, Rounding R>
__global__ void __launch_bounds__(kThreads)
    apply_update_dense(const __grid_constant__ Table<3, uint32_t> table,
                       const __grid_constant__ ApplyUpdate<S> rule) {
  constexpr int V = 16 / sizeof(P);
  const Piece piece = piece_of(table, blockIdx.x);
  const uint32_t key = table.own[piece.tensor], place = uint32_t(piece.begin);
  char* const* at = table.at[piece.tensor];
  P* p = reinterpret_cast<P*>(at[0]) + piece.begin;
  const S* u = reinterpret_cast<const S*>(at[1]) + piece.begin;
  uint16_t* low = reinterpret_cast<uint16_t*>(at[2]) + piece.begin;
  const bool aligned = on_16_bytes(p, u, R == Rounding::exact ? low : nullptr);
  in_packs<V>(piece.count, aligned, int(threadIdx.x), kThreads, [&](auto width, int i) {
    auto ps = load<width.value>(p + i);
    const auto us = load<width.value>(u + i);
    auto lows = load_low<R, width.value>(low + i);
#pragma unroll
    for (int k = 0; k < width.value; ++k) {
      apply_to_entry<R>(rule, ps.x[k], us.x[k], lows.x[k], key, place + i + k);
    }
    store(p + i, ps);
    store_low<R>(low + i, lows);
  });
}

template <class P, class S, Rounding R>
__global__ void __launch_bounds__(kThreads)
    apply_update_strided(const __grid_constant__ Strided<3, uint32_t> table,
                         const __grid_constant__ ApplyUpdate<S> rule) {
  const int64_t begin = int64_t(blockIdx.x) * kChunkEntries;
  const int64_t end = begin + kChunkEntries < table.entries ? begin + kChunkEntries : table.entries;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    char* at[3];
    places_of(table, i, at);
    const auto place = uint32_t((at[0] - table.at[0]) / int64_t(sizeof(P)));
    apply_to_entry<R>(rule, *reinterpret_cast<P*>(at[0]), *reinterpret_cast<const S*>(at[1]),
                      *reinterpret_cast<uint16_t*>(at[2]), table.own, place);
  }
}

template <class P, Rounding R, class S>
void run(const Table<3, uint32_t>& table, const ApplyUpdate<S>& rule, void* stream) {
  launch(apply_update_dense<P, S, R>, table.chunks(), kThreads, stream, table, rule);
}

template <class P, Rounding R, class S>
void run(const Strided<3, uint32_t>& table, const ApplyUpdate<S>& rule, void* stream) {
  launch(apply_update_strided<P, S, R>, table.chunks(), kThreads, stream, table, rule);
}

}  // namespace

template <class S, class T>
void apply_update(const T& table, const ApplyUpdate<S>& rule, Kind param, Rounding rounding,
                  void* stream) {
  if constexpr (sizeof(S) == sizeof(double)) {
    run<double, Rounding::nearest>(table, rule, stream);
  } else {
    with_parameter(param, rounding, [&](auto* p, auto rounds) {
      run<std::remove_pointer_t<decltype(p)>, rounds.how>(table, rule, stream);
    });
  }
}

#define FOR(S, T) \
  template void apply_update(const T<3, uint32_t>&, const ApplyUpdate<S>&, Kind, Rounding, void*);
FOR(float, Table)
FOR(float, Strided)
FOR(double, Table)
FOR(double, Strided)
#undef FOR

}  // namespace deepopt::cuda
