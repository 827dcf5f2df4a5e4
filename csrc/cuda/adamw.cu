#include "adamw_kernels.h"

#include "parameter.cuh"

namespace deepopt::cuda {
namespace {

__device__ __forceinline__ double read(const void* count, Kind dtype) {
  if (dtype == Kind::f64) return *static_cast<const double*>(count);
  return *static_cast<const float*>(count);
}

__global__ void __launch_bounds__(kThreads) add_one(const __grid_constant__ Counts counts,
                                                    Kind dtype) {
  const int t = int(blockIdx.x * kThreads + threadIdx.x);
  if (t >= counts.tensors) return;
  if (dtype == Kind::f64) {
    *static_cast<double*>(counts.at[t]) += 1;
  } else {
    *static_cast<float*>(counts.at[t]) += 1;
  }
}

// The rule at a parameter's step. One thread computes the powers, which take long in double.
template <class S>
__device__ __forceinline__ AdamW<S> rule_at(AdamW<S> rule, const AtStep<S>& own,
                                            const Decay& decay) {
  rule.step_size = own.step_size;
  rule.root_correction = own.root_correction;
  if (own.count) {  // the same for all of the block
    __shared__ S numbers[2];
    if (threadIdx.x == 0) {
      rule.at_step(decay.lr, decay.beta1, decay.beta2, read(own.count, decay.counts));
      numbers[0] = rule.step_size;
      numbers[1] = rule.root_correction;
    }
    __syncthreads();
    rule.step_size = numbers[0];
    rule.root_correction = numbers[1];
  }
  return rule;
}

template <Rounding R, class P, class G, class S>
__device__ __forceinline__ void entry(const AdamW<S>& rule, P& p, const G& g, S& m, S& v,
                                      uint16_t& low, uint32_t key, uint32_t place) {
  S value = to_fp32<R>(p, low);
  rule(value, widened(g), m, v);
  store_rounded<R>(value, p, low, key, place);
}

template <class P, class G, class S, Rounding R>
__global__ void __launch_bounds__(kThreads)
    adamw_dense(const __grid_constant__ Table<5, AtStep<S>> table,
                const __grid_constant__ AdamW<S> alike, const __grid_constant__ Decay decay) {
  constexpr int V = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
  const Piece piece = piece_of(table, blockIdx.x);
  const AtStep<S>& own = table.own[piece.tensor];
  const AdamW<S> rule = rule_at(alike, own, decay);
  const uint32_t key = own.key, place = uint32_t(piece.begin);
  char* const* at = table.at[piece.tensor];
  P* p = reinterpret_cast<P*>(at[0]) + piece.begin;
  const G* g = reinterpret_cast<const G*>(at[1]) + piece.begin;
  S* m = reinterpret_cast<S*>(at[2]) + piece.begin;
  S* v = reinterpret_cast<S*>(at[3]) + piece.begin;
  uint16_t* low = reinterpret_cast<uint16_t*>(at[4]) + piece.begin;
  const bool aligned = on_16_bytes(p, g, m, v, R == Rounding::exact ? low : nullptr);
  in_packs<V>(piece.count, aligned, int(threadIdx.x), kThreads, [&](auto width, int i) {
    auto ps = load<width.value>(p + i);
    const auto gs = load<width.value>(g + i);
    auto ms = load<width.value>(m + i), vs = load<width.value>(v + i);
    auto lows = load_low<R, width.value>(low + i);
#pragma unroll
    for (int k = 0; k < width.value; ++k) {
      entry<R>(rule, ps.x[k], gs.x[k], ms.x[k], vs.x[k], lows.x[k], key, place + i + k);
    }
    store(p + i, ps);
    store(m + i, ms);
    store(v + i, vs);
    store_low<R>(low + i, lows);
  });
}

template <class P, class G, class S, Rounding R>
__global__ void __launch_bounds__(kThreads)
    adamw_strided(const __grid_constant__ Strided<5, AtStep<S>> table,
                  const __grid_constant__ AdamW<S> alike, const __grid_constant__ Decay decay) {
  const AdamW<S> rule = rule_at(alike, table.own, decay);
  const int64_t begin = int64_t(blockIdx.x) * kChunkEntries;
  const int64_t end = begin + kChunkEntries < table.entries ? begin + kChunkEntries : table.entries;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    char* at[5];
    places_of(table, i, at);
    const auto place = uint32_t((at[0] - table.at[0]) / int64_t(sizeof(P)));
    entry<R>(rule, *reinterpret_cast<P*>(at[0]), *reinterpret_cast<const G*>(at[1]),
             *reinterpret_cast<S*>(at[2]), *reinterpret_cast<S*>(at[3]),
             *reinterpret_cast<uint16_t*>(at[4]), table.own.key, place);
  }
}

template <class P, class G, Rounding R, class S>
void run(const Table<5, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay, void* stream) {
  launch(adamw_dense<P, G, S, R>, table.chunks(), kThreads, stream, table, rule, decay);
}

template <class P, class G, Rounding R, class S>
void run(const Strided<5, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay,
         void* stream) {
  launch(adamw_strided<P, G, S, R>, table.chunks(), kThreads, stream, table, rule, decay);
}

}  // namespace

void count_up(const Counts& counts, Kind dtype, void* stream) {
  launch(add_one, (counts.tensors + kThreads - 1) / kThreads, kThreads, stream, counts, dtype);
}

template <class S, class T>
void adamw(const T& table, const AdamW<S>& rule, const Decay& decay, Kind param, Kind grad,
           Rounding rounding, void* stream) {
  if constexpr (sizeof(S) == sizeof(double)) {
    run<double, double, Rounding::nearest>(table, rule, decay, stream);
  } else {
    with_parameter(param, rounding, [&](auto* p, auto rounds) {
      using P = std::remove_pointer_t<decltype(p)>;
      if (grad == param) {
        run<P, P, rounds.how>(table, rule, decay, stream);
      } else {
        run<P, float, rounds.how>(table, rule, decay, stream);
      }
    });
  }
}

#define FOR(S, T)                                                                        \
  template void adamw(const T<5, AtStep<S>>&, const AdamW<S>&, const Decay&, Kind, Kind, \
                      Rounding, void*);
FOR(float, Table)
FOR(float, Strided)
FOR(double, Table)
FOR(double, Strided)
#undef FOR

}  // namespace deepopt::cuda
