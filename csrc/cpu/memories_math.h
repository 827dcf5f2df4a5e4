// Vectors of one register, and the functions of one number that Hope's kernels share: a part of the
// files that every_level.h compiles.

template <class T>
struct Register {
  typedef T Vector __attribute__((vector_size(kBytes)));
};

// The gates of a head, in the order of Gates in deepopt/hope/memory.py.
enum Gate { kEta, kAlpha, kErase, kDelta, kEraseRange, kDeltaRange };

// a b + c. Float32 alone is fused into one instruction, where the processor has it (kFused); setup.py
// forbids the compiler to fuse anything else.
inline __attribute__((always_inline)) float multiply_add(float a, float b, float c) {
  if constexpr (kFused) return __builtin_fmaf(a, b, c);
  return a * b + c;
}
inline __attribute__((always_inline)) double multiply_add(double a, double b, double c) {
  return a * b + c;
}
template <class T>
inline __attribute__((always_inline)) typename Register<T>::Vector multiply_add(
    T a, typename Register<T>::Vector b, typename Register<T>::Vector c) {
#if defined(__x86_64__)
  typedef typename Register<T>::Vector Vector;
  if constexpr (kFused && kBytes == 64 && sizeof(T) == 4) {
    return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
  }
  if constexpr (kFused && kBytes == 32 && sizeof(T) == 4) {
    return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
  }
#endif
  return a * b + c;
}

// Calls f(i, j) for the entries of a tile. No entry may depend on another one of its row.
template <class F>
inline __attribute__((always_inline)) void each(int64_t rows, int64_t columns, const F& f) {
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) f(i, j);
  }
}

template <class F>
inline __attribute__((always_inline)) void each(int64_t columns, const F& f) {
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) f(j);
}

// exp of what is at most 0, to 2 units in the last place. Below -87 it stays at exp(-87).
inline __attribute__((always_inline)) float decay(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = multiply_add(x, 1.44269504f, 12582912.0f);  // rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = multiply_add(n, -1.42860677e-6f, multiply_add(n, -0.693145752f, x));
  float p = multiply_add(r, 1.0f / 5040, 1.0f / 720);
  p = multiply_add(r, p, 1.0f / 120);
  p = multiply_add(r, p, 1.0f / 24);
  p = multiply_add(r, p, 1.0f / 6);
  p = multiply_add(r, p, 0.5f);
  p = multiply_add(r, p, 1.0f);
  p = multiply_add(r, p, 1.0f);
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
inline double decay(double x) { return std::exp(x); }

// The activation of features, gelu: its value, its slope and the slope of its slope.
template <class T>
struct Activation {
  T value, slope, bend;
};

// The share Phi(x) of a normal distribution below x, with exp(-x^2 / 2) given. In float32 by
// Abramowitz and Stegun 7.1.26, to 7.5e-8.
inline __attribute__((always_inline)) float normal_share(float x, float gauss) {
  const float z = __builtin_fabsf(x) * 0.707106781f;
  const float t = 1.0f / multiply_add(z, 0.3275911f, 1.0f);
  float p = multiply_add(t, 1.061405429f, -1.453152027f);
  p = multiply_add(t, p, 1.421413741f);
  p = multiply_add(t, p, -0.284496736f);
  p = multiply_add(t, p, 0.254829592f);
  const float tail = 0.5f * p * t * gauss;
  return x < 0 ? tail : 1.0f - tail;
}
inline double normal_share(double x, double) { return 0.5 * std::erfc(-x * 0.70710678118654752); }

template <class T>
inline __attribute__((always_inline)) Activation<T> activation(T x) {
  const T gauss = decay(T(-0.5) * x * x);
  const T share = normal_share(x, gauss), density = gauss * T(0.3989422804014327);
  return {x * share, share + x * density, density * (T(2) - x * x)};
}

inline __attribute__((always_inline)) float root(float x) { return __builtin_sqrtf(x); }
inline __attribute__((always_inline)) double root(double x) { return __builtin_sqrt(x); }

template <class T>
T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}
// As torch's clamp: not a number stays what it is.
template <class T>
T at_most_1(T x) {
  return x > T(1) ? T(1) : x;
}
template <class T>
T log_sigmoid(T x) {
  return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
}
