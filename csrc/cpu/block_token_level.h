// One token of every sequence through one block of Hope, for one level of the processor.
// block_token.cpp includes this once per level, in a namespace of its own. Equations and names are
// those of deepopt/hope/memory.py. The rows of a matrix are contiguous.

#include "memories_math.h"

constexpr int64_t kAtOnce = 1 << 16;  // multiplications below which another thread does not pay

// out = the products of kCount rows of a matrix with x.
template <int kCount, class T>
inline __attribute__((always_inline)) void dots(T* out, const T* matrix, int64_t columns,
                                                const T* x) {
  typedef typename Register<T>::Vector Vector;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  Vector sums[kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) sums[r] = Vector{};
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vector right;
    memcpy(&right, x + j, sizeof right);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      Vector left;
      memcpy(&left, matrix + r * columns + j, sizeof left);
      sums[r] += left * right;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    T lanes[kLanes];
    memcpy(lanes, &sums[r], sizeof lanes);
#pragma GCC unroll 4
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    for (int64_t k = j; k < columns; ++k) {
      lanes[0] = multiply_add(matrix[r * columns + k], x[k], lanes[0]);
    }
    out[r] = lanes[0];
  }
}

// out = matrix x
template <class T>
inline void times(T* out, const T* matrix, int64_t rows, int64_t columns, const T* x) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dots<4>(out + i, matrix + i * columns, columns, x);
  for (; i < rows; ++i) dots<1>(out + i, matrix + i * columns, columns, x);
}

// The same for every sequence: row b of `out` and of `x` belongs to sequence b.
template <class T>
void times_all(T* out, const T* matrix, int64_t rows, int64_t columns, const T* x, int64_t batch) {
  const int64_t fours = (rows + 3) / 4;
  const int64_t grain = std::max<int64_t>(1, kAtOnce / (4 * columns * batch));
  torch::stable::parallel_for(0, fours, grain, [&](int64_t first, int64_t last) {
    for (int64_t four = first; four < last; ++four) {
      const int64_t i = 4 * four, count = std::min<int64_t>(4, rows - i);
      for (int64_t b = 0; b < batch; ++b) {
        times(out + b * rows + i, matrix + i * columns, count, columns, x + b * columns);
      }
    }
  });
}

template <class T>
T dot(const T* x, const T* y, int64_t count) {
  T sum;
  dots<1>(&sum, x, count, y);
  return sum;
}

template <class T>
void normalize(T* out, const T* x, const T* weight, int64_t count, T eps) {
  const T factor = T(1) / root(dot(x, x, count) / T(count) + eps);
  each(count, [=](int64_t j) { out[j] = x[j] * factor * weight[j]; });
}

template <class T>
void unit(T* out, const T* x, int64_t count) {
  const T factor = T(1) / root(dot(x, x, count) + T(1e-6));
  each(count, [=](int64_t j) { out[j] = x[j] * factor; });
}

// f = unit(gelu(W2 x)). Also the slopes of gelu, and what its values were multiplied by.
template <class T>
T features(T* f, T* slope, const T* w2, int64_t hidden, int64_t d, const T* x, T floor) {
  times(f, w2, hidden, d, x);
  each(hidden, [=](int64_t j) {
    const Activation<T> a = activation(f[j]);
    f[j] = a.value, slope[j] = a.slope;
  });
  const T factor = T(1) / root(dot(f, f, hidden) + floor);
  each(hidden, [=](int64_t j) { f[j] *= factor; });
  return factor;
}

template <class T>
T pooled(const T* x, int64_t count) {
  T sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += x[j];
  return sum / root(T(count));
}

// to = kept x + pulled initial + factor y, where `initial` may be null.
template <class T>
inline void move_row(T* to, const T* x, const T* initial, T kept, T pulled, T factor, const T* y,
                     int64_t count) {
  if (initial) {
    each(count, [=](int64_t j) { to[j] = kept * x[j] + pulled * initial[j] + factor * y[j]; });
  } else {
    each(count, [=](int64_t j) { to[j] = kept * x[j] + factor * y[j]; });
  }
}

// One of a head's five memories: its weights now, at its anchor and at the start, where they are null
// if retention leads to zero; and what they become.
template <class T>
struct Memory {
  const T *w2, *w1, *anchor_w2, *anchor_w1, *initial_w2, *initial_w1;
  T *to_w2, *to_w1;
  int64_t hidden, d;
  T floor;
};

// Scratch of a head, in rows that fit a head's width and its memories' hidden widths.
template <class T>
struct Head {
  T *f, *slope, *other, *made, *key, *value, *hat, *error, *back;
  static constexpr int64_t kRows = 12;

  Head(T* memory, int64_t width) {
    T** each[] = {&f, &slope, &other, &key, &value, &hat, &error, &back, &made};
    // `made` comes last and takes the four rows that are left.
    for (T** one : each) *one = memory, memory += width;
  }
};

// out = x + W1 f(x)
template <class T>
void recall(T* out, Head<T>& to, const T* w2, const T* w1, const Memory<T>& m, const T* x) {
  features(to.other, to.slope, w2, m.hidden, m.d, x, m.floor);
  times(out, w1, m.d, m.hidden, to.other);
  each(m.d, [=](int64_t j) { out[j] += x[j]; });
}

// Writes the token into one memory. `delta` is null in those that generate.
template <class T>
void write(Head<T>& to, const Memory<T>& m, T eta, T erase, const T* delta, T kept, T pulled) {
  const int64_t d = m.d, n = m.hidden;
  recall(to.hat, to, m.anchor_w2, m.anchor_w1, m, to.value);
  unit(to.hat, to.hat, d);
  const T factor = features(to.f, to.slope, m.anchor_w2, n, d, to.key, m.floor);
  times(to.error, m.anchor_w1, d, n, to.f);
  T *error = to.error, *back = to.back, *f = to.f, *slope = to.slope;
  const T *key = to.key, *hat = to.hat, *value = to.value;
  each(d, [=](int64_t j) { error[j] = eta * (key[j] + error[j] - hat[j]); });
  std::fill_n(back, n, T(0));
  for (int64_t i = 0; i < d; ++i) {
    const T *row = m.anchor_w1 + i * n, by = error[i];
    each(n, [=](int64_t j) { back[j] += by * row[j]; });
  }
  const T along = dot(f, back, n);
  each(n, [=](int64_t j) { slope[j] *= factor * (back[j] - f[j] * along); });
  T* seen = to.other;
  times(seen, m.w2, n, d, key);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * d;
    move_row(m.to_w2 + at, m.w2 + at, m.initial_w2 ? m.initial_w2 + at : nullptr, kept, pulled,
             -slope[i] - erase * seen[i], key, d);
  }
  if (delta) times(seen, m.w1, d, n, f);
  for (int64_t i = 0; i < d; ++i) {
    const int64_t at = i * n;
    const T wrote = delta ? *delta * (value[i] - key[i] - seen[i]) : -error[i];
    move_row(m.to_w1 + at, m.w1 + at, m.initial_w1 ? m.initial_w1 + at : nullptr, kept, pulled, wrote,
             f, n);
  }
}

// Eq 83, Eq 84, Eq 85, Eq 86, Eq 87, Eq 88, Eq 89 and Eq 90 for one token of one head. `out` is
// what mem answers to the query.
template <class T>
void attend(T* out, Head<T>& to, const Memory<T>* memories, const T* x_key, const T* x_value,
            const T* query, const T* gates, const Form& form) {
  const Memory<T>& mem = memories[4];
  const int64_t d = mem.d, third = d / 3, keep = d - 2 * third;
  recall(out, to, mem.w2, mem.w1, mem, query);
  for (int g = 0; g < 4; ++g) {
    const Memory<T>& m = memories[g];
    recall(to.made + g * d, to, m.anchor_w2, m.anchor_w1, m, g == 1 ? x_value : x_key);
  }
  unit(to.key, to.made, d);
  unit(to.value, to.made + d, d);
  const T* alpha = to.made + 3 * d;
  const T retention = pooled(alpha, keep) + gates[kAlpha], kept = sigmoid(retention);
  const T half = (T(1) + kept) / 2, sharpness = T(form.sharpness);
  const T eta = T(form.max_eta) * half * sigmoid(pooled(to.made + 2 * d, d) + gates[kEta]);
  const auto share = [&](const T* channels, T bias, T range) {
    const T open = sigmoid(sharpness * pooled(channels, third) + bias);
    return half * at_most_1(T(1.1) * sigmoid(range) * open);
  };
  const T erase = T(form.max_erase) * share(alpha + keep, gates[kErase], gates[kEraseRange]);
  const T delta =
      T(form.max_delta) * share(alpha + keep + third, gates[kDelta], gates[kDeltaRange]);
  const T pulled = sigmoid(-retention);
  const T* none = nullptr;
  for (int g = 0; g < 4; ++g) write(to, memories[g], eta, eta, none, kept, pulled);
  write(to, mem, eta, erase, &delta, kept, pulled);
}

// A causal convolution of one channel for one token, which moves on the channel's tail.
template <class T>
T convolve(T* new_tail, const T* tail, const T* weight, int64_t width, T x) {
  T sum = weight[width - 1] * x;
  for (int64_t i = 0; i + 1 < width; ++i) {
    sum += weight[i] * tail[i];
    new_tail[i] = i + 2 < width ? tail[i + 1] : x;
  }
  return sum;
}

// Turns the first two channels of some heads' queries, and moves on the phase.
template <class T>
void turn(T* query, T* new_phase, const T* phase, const T* rates, const Sizes& s, double sharpness) {
  for (int64_t h = 0; h < s.turning; ++h) {
    const T gate = T(1.2) * sigmoid(T(sharpness) * rates[s.turning + h]) - T(0.1);
    const T angle = rates[h] * std::min(std::max(gate, T(0)), T(1));
    // In float64: a long sum would leave float32 no digits for the angle within a turn.
    const double now = double(phase[h]) + double(angle), turns = 2 * 3.14159265358979323846;
    const T cosine = T(std::cos(now)), sine = T(std::sin(now));
    T* at = query + h * s.d;
    const T a = at[0], b = at[1];
    at[0] = a * cosine - b * sine, at[1] = a * sine + b * cosine;
    new_phase[h] = T(now - turns * std::floor(now / turns));
  }
}

template <class T>
void run(const Sizes& s, const Form& form, const Given<T>& given, const Made<T>& made) {
  const int64_t batch = s.batch, dim = s.dim, d = s.d, tail = dim * (s.width - 1);
  const T eps = T(form.eps);
  // Rows of a sequence: the normed input, its projections, and what the heads answer.
  std::vector<T> memory(batch * (7 * dim + 2 * s.turning + s.widest));
  T* next = memory.data();
  const auto rows = [&](int64_t width) {
    T* taken = next;
    next += batch * width;
    return taken;
  };
  T *normed = rows(dim), *key = rows(dim), *value = rows(dim), *query = rows(dim);
  T *gate = rows(dim), *answers = rows(dim), *branch = rows(dim), *turns = rows(2 * s.turning);
  T* hidden = rows(s.widest);
  for (int64_t b = 0; b < batch; ++b) {
    normalize(normed + b * dim, given.x + b * dim, given.norm, dim, eps);
  }
  times_all(key, given.key, dim, dim, normed, batch);
  times_all(value, given.value, dim, dim, normed, batch);
  times_all(query, given.query, dim, dim, normed, batch);
  times_all(gate, given.gate, dim, dim, normed, batch);
  if (s.turning) times_all(turns, given.turns, 2 * s.turning, dim, normed, batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (int which = 0; which < 3; ++which) {
      T* at = (which == 0 ? key : which == 1 ? value : query) + b * dim;
      const T* before = given.tails[which] + b * tail;
      T* after = made.tails[which] + b * tail;
      for (int64_t c = 0; c < dim; ++c) {
        const int64_t row = c * (s.width - 1);
        at[c] = convolve(after + row, before + row, given.convolutions[which] + c * s.width,
                         s.width, at[c]);
      }
      if (which < 2) each(dim, [=](int64_t c) { at[c] *= sigmoid(at[c]); });
    }
    T* queries = query + b * dim;
    for (int64_t h = 0; h < s.heads; ++h) unit(queries + h * d, queries + h * d, d);
    turn(queries, made.phase + b * s.turning, given.phase + b * s.turning,
         turns + b * 2 * s.turning, s, form.sharpness);
  }
  const int64_t generator = s.hidden * d, mem = s.memory_hidden * d;  // entries of their W2
  const int64_t width = std::max({d, s.hidden, s.memory_hidden});
  const int64_t grain = std::max<int64_t>(1, kAtOnce / (8 * generator + 2 * mem));
  torch::stable::parallel_for(0, batch * s.heads, grain, [&](int64_t first, int64_t last) {
    std::vector<T> scratch(Head<T>::kRows * width);
    Head<T> head(scratch.data(), width);
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t h = pair % s.heads;
      Memory<T> memories[5];
      for (int m = 0; m < 5; ++m) {
        const int stack = m < 4 ? 0 : 1;
        const int64_t at = m < 4 ? (4 * pair + m) * generator : pair * mem;
        const int64_t start = m < 4 ? (4 * h + m) * generator : h * mem;
        const auto of = [&](int i) { return given.weights[stack][i] + at; };
        const auto at_start = [&](int i) {
          const T* all = given.initial[stack][i];
          return all ? all + start : nullptr;
        };
        memories[m] = {of(0), of(1), of(2), of(3), at_start(0), at_start(1),
                       made.weights[stack][0] + at, made.weights[stack][1] + at,
                       m < 4 ? s.hidden : s.memory_hidden, d,
                       T(m < 4 ? form.generator_floor : form.memory_floor)};
      }
      T* out = answers + pair * d;
      attend(out, head, memories, key + pair * d, value + pair * d, query + pair * d,
             given.gates + 6 * h, form);
      normalize(out, out, given.head_norm, d, eps);
      const T* by = gate + pair * d;
      each(d, [=](int64_t j) { out[j] *= by[j] * sigmoid(by[j]); });
    }
  });
  times_all(branch, given.output, dim, dim, answers, batch);
  T* y = made.y;
  const T* x = given.x;
  each(batch * dim, [=](int64_t j) { y[j] = x[j] + branch[j]; });
  for (const Level<T>& level : given.levels) {
    for (int64_t b = 0; b < batch; ++b) {
      normalize(normed + b * dim, y + b * dim, level.norm, dim, eps);
    }
    times_all(hidden, level.up, level.hidden, dim, normed, batch);
    each(batch * level.hidden, [=](int64_t j) { hidden[j] = activation(hidden[j]).value; });
    times_all(branch, level.down, dim, level.hidden, hidden, batch);
    each(batch * dim, [=](int64_t j) { y[j] += branch[j]; });
  }
}
