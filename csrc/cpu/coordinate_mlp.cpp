// deepopt::coordinate_mlp and deepopt::coordinate_mlp_gradient on the CPU. A tile of entries stays
// in the nearest cache while one unit after the other goes over it, in a loop that is vectorized.
#include "../common/coordinate_mlp_arguments.h"
#include "../common/matrices.h"

namespace deepopt {
namespace {

constexpr int64_t kTile = 512;  // entries
constexpr int64_t kFew =
    kChunk;  // entries that are worth a thread: each takes long here, so fewer than elsewhere
constexpr int kLanes = 16;      // partial sums of a gradient, on every processor
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

DEEPOPT_CLONES void scale(float* to, const float* from, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

// value += v tanh(w x); active keeps the tanh.
template <int F>
inline __attribute__((always_inline)) void unit(const float* w, const float (*features)[kTile],
                                                float* value, float* active, int64_t count) {
  float weights[F];
  for (int f = 0; f < F; ++f) weights[f] = w[f];
  const float readout = w[F];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    float x[F];
    for (int f = 0; f < F; ++f) x[f] = features[f][i];
    active[i] = unit_value<F>(weights, x);
    value[i] = fma_(readout, active[i], value[i]);
  }
}

// Adds the gradient of one unit to `sums`, kLanes for each weight. The factor v that the gradient
// of the features' weights has is left to the end.
template <int F>
inline __attribute__((always_inline)) void learn(float* sums, const float (*features)[kTile],
                                                 const float* active, const float* slope,
                                                 int64_t count) {
  Lanes part[F + 1] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes a, s;
    memcpy(&a, active + i, sizeof a);
    memcpy(&s, slope + i, sizeof s);
    const Lanes below = s - s * a * a;
    for (int f = 0; f < F; ++f) {
      Lanes x;
      memcpy(&x, features[f] + i, sizeof x);
      part[f] += below * x;
    }
    part[F] += s * a;
  }
  for (int f = 0; f <= F; ++f) {
    Lanes sum;
    memcpy(&sum, sums + f * kLanes, sizeof sum);
    sum += part[f];
    memcpy(sums + f * kLanes, &sum, sizeof sum);
  }
}

#define FEATURES(F)                                                                             \
  DEEPOPT_CLONES void unit##F(const float* w, const float (*x)[kTile], float* value,            \
                              float* active, int64_t count) {                                   \
    unit<F>(w, x, value, active, count);                                                        \
  }                                                                                             \
  DEEPOPT_CLONES void learn##F(float* sums, const float (*x)[kTile], const float* active,       \
                               const float* slope, int64_t count) {                             \
    learn<F>(sums, x, active, slope, count);                                                    \
  }
FEATURES(1)
FEATURES(2)
FEATURES(3)
FEATURES(4)
#undef FEATURES

constexpr decltype(&unit1) kUnit[] = {unit1, unit2, unit3, unit4};
constexpr decltype(&learn1) kLearn[] = {learn1, learn2, learn3, learn4};

DEEPOPT_CLONES void finish(const Correction& rule, float* to, const float* base, const float* value,
                           int64_t count) {
  const Correction by = rule;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = by.result(base[i], value[i]);
}

DEEPOPT_CLONES void slopes(const Correction& rule, float* to, const float* base, const float* value,
                           const float* target, int64_t count) {
  const Correction by = rule;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = by.slope(base[i], value[i], target[i]);
}

// A tile's features, the tanh of its units and their weighted sum. Entries beyond the count, up to
// a multiple of kLanes, are zero and add nothing.
struct Tile {
  alignas(64) float x[CoordinateMlp::kMostFeatures][kTile];
  alignas(64) float value[kTile];
  alignas(64) float slope[kTile];
  std::vector<float> active;
  bool keeps;

  Tile(int64_t units, bool keeps) : active((keeps ? units : 1) * kTile), keeps(keeps) {}

  void forward(const CoordinateMlp& mlp, int64_t b, int64_t at, int64_t count) {
    const int width = mlp.count + 1;
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int f = 0; f < width - 1; ++f) {
      scale(x[f], mlp.features[f] + at, mlp.scales[b * (width - 1) + f], count);
      std::fill(x[f] + count, x[f] + padded, 0.0f);
    }
    std::fill(value, value + padded, 0.0f);
    for (int64_t k = 0; k < mlp.units; ++k) {
      float* a = active.data() + (keeps ? k : 0) * kTile;
      kUnit[width - 2](mlp.weights + (b * mlp.units + k) * width, x, value, a, count);
      std::fill(a + count, a + padded, 0.0f);
    }
    std::fill(slope + count, slope + padded, 0.0f);
  }
};

Tensor coordinate_mlp(Tensor base, Tensor reach, std::vector<Tensor> features, Tensor scales,
                      Tensor weights) {
  const CoordinateMlpArguments given(base, reach, features, scales, weights);
  const CoordinateMlp& mlp = given.mlp;
  Tensor result = torch::stable::empty(base.sizes(), ScalarType::Float);
  float* to = result.mutable_data_ptr<float>();
  for_pieces(
      mlp.batch, mlp.entries,
      [&](int64_t b, int64_t begin, int64_t end, int64_t) {
        Tile tile(mlp.units, false);
        const Correction rule{mlp.reach[b], 0, 0};
        for (int64_t from = begin; from < end; from += kTile) {
          const int64_t at = b * mlp.entries + from, count = std::min(kTile, end - from);
          tile.forward(mlp, b, at, count);
          finish(rule, to + at, mlp.base + at, tile.value, count);
        }
      },
      kFew);
  return result;
}

Tensor coordinate_mlp_gradient(Tensor base, Tensor reach, std::vector<Tensor> features,
                               Tensor scales, Tensor weights, Tensor target, Tensor unit) {
  CoordinateMlpArguments given(base, reach, features, scales, weights);
  const CoordinateMlp& mlp = given.mlp;
  const float* aim = given.arrays.read_count(target, mlp.batch * mlp.entries);
  const float* units = given.arrays.read_count(unit, mlp.batch);
  const int width = mlp.count + 1;
  const int64_t numbers = mlp.units * width, each = chunks_of(mlp.entries);
  std::vector<double> partial(mlp.batch * each * numbers);
  for_pieces(
      mlp.batch, mlp.entries,
      [&](int64_t b, int64_t begin, int64_t end, int64_t c) {
        Tile tile(mlp.units, true);
        std::vector<float> sums(numbers * kLanes);
        const float share = mlp.reach[b] / units[b] / float(mlp.entries);
        const Correction rule{mlp.reach[b], 1 / units[b], share};
        for (int64_t from = begin; from < end; from += kTile) {
          const int64_t at = b * mlp.entries + from, count = std::min(kTile, end - from);
          tile.forward(mlp, b, at, count);
          slopes(rule, tile.slope, mlp.base + at, tile.value, aim + at, count);
          for (int64_t k = 0; k < mlp.units; ++k) {
            const float* active = tile.active.data() + k * kTile;
            kLearn[width - 2](sums.data() + k * width * kLanes, tile.x, active, tile.slope, count);
          }
        }
        for (int64_t s = 0; s < numbers; ++s) {
          double sum = 0;
          for (int j = 0; j < kLanes; ++j) sum += double(sums[s * kLanes + j]);
          partial[c * numbers + s] = sum;
        }
      },
      kFew);
  Tensor gradient = torch::stable::empty(weights.sizes(), ScalarType::Float);
  float* to = gradient.mutable_data_ptr<float>();
  for (int64_t b = 0; b < mlp.batch; ++b) {
    for (int64_t s = 0; s < numbers; ++s) {
      double sum = 0;
      for (int64_t c = 0; c < each; ++c) sum += partial[(b * each + c) * numbers + s];
      const bool readout = s % width == width - 1;
      const float v = mlp.weights[b * numbers + s / width * width + width - 1];
      to[b * numbers + s] = float(readout ? sum : sum * double(v));
    }
  }
  return gradient;
}

}  // namespace
}  // namespace deepopt

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  m.impl("coordinate_mlp", TORCH_BOX(&deepopt::coordinate_mlp));
  m.impl("coordinate_mlp_gradient", TORCH_BOX(&deepopt::coordinate_mlp_gradient));
}
