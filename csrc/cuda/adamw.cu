#include "adamw.h"

#include "device.cuh"

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

// The rule at the parameter's step; one thread takes the powers, as they are long in double.
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

template <class P, class G, class S>
__device__ __forceinline__ void entry(const AdamW<S>& rule, P& p, const G& g, S& m, S& v) {
  S wide = widened(p);
  rule(wide, widened(g), m, v);
  narrow(wide, p);
}

template <class P, class G, class S>
__global__ void __launch_bounds__(kThreads)
    adamw_dense(const __grid_constant__ Table<4, AtStep<S>> table,
                const __grid_constant__ AdamW<S> alike, const __grid_constant__ Decay decay) {
  constexpr int V = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
  const Piece piece = piece_of(table, blockIdx.x);
  const AdamW<S> rule = rule_at(alike, table.own[piece.tensor], decay);
  char* const* at = table.at[piece.tensor];
  P* p = reinterpret_cast<P*>(at[0]) + piece.begin;
  const G* g = reinterpret_cast<const G*>(at[1]) + piece.begin;
  S* m = reinterpret_cast<S*>(at[2]) + piece.begin;
  S* v = reinterpret_cast<S*>(at[3]) + piece.begin;
  int done = 0;
  if (on_16_bytes(p, g, m, v)) {
    done = piece.count / V * V;
    for (int i = int(threadIdx.x) * V; i < done; i += kThreads * V) {
      Pack<P, V> ps = load<V>(p + i);
      const Pack<G, V> gs = load<V>(g + i);
      Pack<S, V> ms = load<V>(m + i), vs = load<V>(v + i);
#pragma unroll
      for (int k = 0; k < V; ++k) entry(rule, ps.x[k], gs.x[k], ms.x[k], vs.x[k]);
      store(p + i, ps);
      store(m + i, ms);
      store(v + i, vs);
    }
  }
  for (int i = done + int(threadIdx.x); i < piece.count; i += kThreads) {
    entry(rule, p[i], g[i], m[i], v[i]);
  }
}

template <class P, class G, class S>
__global__ void __launch_bounds__(kThreads)
    adamw_strided(const __grid_constant__ Strided<4, AtStep<S>> table,
                  const __grid_constant__ AdamW<S> alike, const __grid_constant__ Decay decay) {
  const AdamW<S> rule = rule_at(alike, table.own, decay);
  const int64_t begin = int64_t(blockIdx.x) * kChunkEntries;
  const int64_t end = begin + kChunkEntries < table.entries ? begin + kChunkEntries : table.entries;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    char* at[4];
    places_of(table, i, at);
    entry(rule, *reinterpret_cast<P*>(at[0]), *reinterpret_cast<const G*>(at[1]),
          *reinterpret_cast<S*>(at[2]), *reinterpret_cast<S*>(at[3]));
  }
}

template <class P, class G, class S>
void run(const Table<4, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay, void* stream) {
  launch(adamw_dense<P, G, S>, table.chunks(), kThreads, stream, table, rule, decay);
}

template <class P, class G, class S>
void run(const Strided<4, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay,
         void* stream) {
  const int64_t blocks = (table.entries + kChunkEntries - 1) / kChunkEntries;
  launch(adamw_strided<P, G, S>, blocks, kThreads, stream, table, rule, decay);
}

template <class T>
void choose(const T& table, const AdamW<float>& rule, const Decay& decay, Kind param, Kind grad,
            void* stream) {
  if (param == Kind::f32) {
    run<float, float>(table, rule, decay, stream);
  } else if (param == Kind::bf16) {
    grad == param ? run<bf16, bf16>(table, rule, decay, stream)
                  : run<bf16, float>(table, rule, decay, stream);
  } else {
    grad == param ? run<fp16, fp16>(table, rule, decay, stream)
                  : run<fp16, float>(table, rule, decay, stream);
  }
}

template <class T>
void choose(const T& table, const AdamW<double>& rule, const Decay& decay, Kind, Kind,
            void* stream) {
  run<double, double>(table, rule, decay, stream);
}

}  // namespace

void count_up(const Counts& counts, Kind dtype, void* stream) {
  launch(add_one, (counts.tensors + kThreads - 1) / kThreads, kThreads, stream, counts, dtype);
}

template <class S>
void adamw(const Table<4, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay, Kind param,
           Kind grad, void* stream) {
  choose(table, rule, decay, param, grad, stream);
}

template <class S>
void adamw(const Strided<4, AtStep<S>>& table, const AdamW<S>& rule, const Decay& decay, Kind param,
           Kind grad, void* stream) {
  choose(table, rule, decay, param, grad, stream);
}

#define FOR(T, S)                                                                          \
  template void adamw<S>(const T<4, AtStep<S>>&, const AdamW<S>&, const Decay&, Kind, Kind, \
                         void*);
FOR(Table, float)
FOR(Table, double)
FOR(Strided, float)
FOR(Strided, double)
#undef FOR

}  // namespace deepopt::cuda
