// The arithmetic of Hope's memories for one head of one sequence, for one level of the processor.
// memories.cpp includes this once per level, in a namespace of its own; kBytes is the length of a
// register. docs/hope_chunks.md has the equations. The list at Head's members says which symbol of
// that page each tile holds.
//
// A tile holds channels or features in its rows and tokens in its columns, or the other way around
// where its name ends in T. Columns are padded to whole vectors. What is beyond the tokens is zero:
// a padded token has a key of zero and rates of zero, so that it writes and forgets nothing.
// What is beyond the channels has no meaning, and no result depends on it.

#include "memories_math.h"

constexpr int64_t kRows = kBytes == 64 ? 8 : 4;  // rows of a product that are summed in registers

template <class T>
struct Left {
  const T* at;
  int64_t down, along;  // from one row, and from one entry of a row, to the next
};

template <class T>
struct Tile {
  T* at;
  int64_t rows, columns;
  int64_t row;  // from one row to the next

  T* operator[](int64_t i) const { return at + i * row; }
  Left<T> left() const { return {at, row, 1}; }
  Left<T> transposed() const { return {at, 1, row}; }
  Tile part(int64_t first, int64_t count) const { return {at + first * row, count, columns, row}; }
  Tile half(int64_t which) const { return {at + which * columns / 2, rows, columns / 2, row}; }
};

enum Into { kSet, kAdd, kSubtract };

// kCount rows by kVectors vectors of a product.
template <Into kInto, int kCount, int kVectors, class T>
inline __attribute__((always_inline)) void multiply_block(T* out, int64_t out_row, Left<T> left,
                                                          int64_t depth, const T* right,
                                                          int64_t right_row) {
  typedef typename Register<T>::Vector Vector;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  Vector sums[kCount][kVectors], row[kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
  }
  const T* from = left.at;
  for (int64_t k = 0; k < depth; ++k, from += left.along, right += right_row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) memcpy(&row[v], right + v * kLanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const T x = from[r * left.down];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<T>(x, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + r * out_row + v * kLanes;
      Vector old;
      if (kInto != kSet) memcpy(&old, to, sizeof(Vector));
      if (kInto == kAdd) sums[r][v] = old + sums[r][v];
      if (kInto == kSubtract) sums[r][v] = old - sums[r][v];
      memcpy(to, &sums[r][v], sizeof(Vector));
    }
  }
}

template <Into kInto, int kCount, class T>
inline __attribute__((always_inline)) void multiply_rows(Tile<T> out, int64_t i, Left<T> left,
                                                         int64_t depth, Tile<T> right) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  left.at += i * left.down;
  int64_t j = 0;
  for (; j + 2 * kLanes <= out.columns; j += 2 * kLanes) {
    multiply_block<kInto, kCount, 2>(out[i] + j, out.row, left, depth, right.at + j, right.row);
  }
  for (; j < out.columns; j += kLanes) {
    multiply_block<kInto, kCount, 1>(out[i] + j, out.row, left, depth, right.at + j, right.row);
  }
}

// out = left right, or out + left right, or out - left right: a matrix on the left that is read by
// strides, so that it may be transposed, and `depth` rows of a tile on the right.
template <Into kInto, class T>
__attribute__((noinline)) void multiply(Tile<T> out, Left<T> left, int64_t depth, Tile<T> right) {
  int64_t i = 0;
  for (; i + kRows <= out.rows; i += kRows) multiply_rows<kInto, kRows>(out, i, left, depth, right);
  for (; i < out.rows; ++i) multiply_rows<kInto, 1>(out, i, left, depth, right);
}

// out = in^T; columns of the input come in fours.
template <class T>
__attribute__((noinline)) void transpose(Tile<T> out, Tile<T> in) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  int64_t i = 0;
  for (; i + 4 <= in.rows; i += 4) {
    for (int64_t j = 0; j < in.columns; j += 4) {
      Four a, b, c, d;
      memcpy(&a, in[i] + j, sizeof a);
      memcpy(&b, in[i + 1] + j, sizeof b);
      memcpy(&c, in[i + 2] + j, sizeof c);
      memcpy(&d, in[i + 3] + j, sizeof d);
      const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four ba = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const Four columns[4] = {
          __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
          __builtin_shufflevector(ba, dc, 0, 1, 4, 5), __builtin_shufflevector(ba, dc, 2, 3, 6, 7)};
      for (int k = 0; k < 4; ++k) {
        if (j + k < out.rows) memcpy(out[j + k] + i, &columns[k], sizeof(Four));
      }
    }
  }
  for (; i < in.rows; ++i) {
    for (int64_t j = 0; j < out.rows; ++j) out[j][i] = in[i][j];
  }
}

// One head of one sequence. It holds the running weights, and all the tiles of a chunk.
template <class T>
class Head {
 public:
  Head(const Shape& shape, const Form& form, bool backward, T* memory)
      : s_(shape), form_(form), memory_(memory) {
    width_ = padded(s_.longest);
    const int64_t d = s_.dim, h = s_.hidden, n = s_.memory_hidden, c = s_.longest, w = width_;
    const int64_t rows = s_.rows();
    for (Weights* each : {&buffers_[0], &buffers_[1], &buffers_[2], &initial_}) *each = weights();
    running_ = buffers_[0], anchor_ = buffers_[1];
    for (Tile<T>* each : {&x_key_, &x_value_, &query_}) *each = tile(d, w);
    gen_f_ = tile(4 * h, w), gen_s_ = tile(4 * h, w), made_ = tile(4 * d, w);
    kv_ = tile(d, 2 * w), f_ = tile(rows, 2 * w), slopes_ = tile(rows, 2 * w);
    bend_ = tile(backward ? rows : 0, w);
    read_ = tile(5 * d, 2 * w), hat_ = tile(5 * d, w), error_ = tile(5 * d, w);
    scaled_ = tile(5 * d, w), p_ = tile(rows, w), slope_ = tile(rows, w);
    for (Tile<T>* each : {&decay_, &v_, &v1_, &eta_inverse_, &erase_inverse_, &delta_inverse_,
                          &m1_, &m2_, &square_, &square_t_}) {
      *each = tile(c, w);
    }
    kv_t_ = tile(2 * w, d), r_ = tile(c, d), z_ = tile(c, d);
    gen_f_t_ = tile(2 * w, h), memory_f_t_ = tile(2 * w, n);
    ka_ = tile(d, w), kb_ = tile(d, w), keep_ = tile(d, d), pull_ = tile(d, d);
    for (Tile<T>* each : {&h2_, &i2_, &x2_, &a2_, &b2_, &fq_, &sq_}) *each = tile(n, w);
    for (Tile<T>* each : {&t_h_, &u_h_}) *each = tile(std::max(h, n), w);
    for (Tile<T>* each : {&h1_, &i1_, &x1_, &a1_, &b1_, &out_, &t_d_, &u_d_}) *each = tile(d, w);
    for (int g = 0; g < 4; ++g) gen_n_[g] = take(w);
    for (int m = 0; m < 5; ++m) n_[m] = take(2 * w), hat_n_[m] = take(w), fp_[m] = take(w);
    key_n_ = take(w), value_n_ = take(w), nq_ = take(w), sum_ = take(2 * w), sum2_ = take(2 * w);
    for (Rates* each : {&rate_, &d_rate_}) {
      for (T** one : {&each->eta, &each->erase, &each->delta, &each->kept, &each->pulled,
                      &each->end}) {
        *one = take(w);
      }
      each->log_b = take(w + 16);
    }
    for (T** one : {&sig_keep_, &sig_eta_, &sig_erase_, &sig_delta_}) *one = take(w);

    if (!backward) return;
    for (Weights* each : {&d_running_, &d_before_, &d_anchor_, &d_initial_}) *each = weights();
    d_kv_ = tile(d, 2 * w), d_f_ = tile(rows, 2 * w), d_read_ = tile(5 * d, 2 * w);
    d_slope_ = tile(rows, w), d_scaled_ = tile(5 * d, w), d_made_ = tile(4 * d, w);
    d_r_ = tile(c, d), d_z_ = tile(c, d), r_t_ = tile(d, w);
    d_keep_ = tile(d, d), d_pull_ = tile(d, d), dd_t_ = tile(d, d), input_t_ = tile(w, d);
    d_x2_ = tile(n, w), d_x1_ = tile(d, w), d_out_ = tile(d, w), d_query_ = tile(d, w);
    d_x_key_ = tile(d, w), d_x_value_ = tile(d, w), d_fq_ = tile(n, w), fq_t_ = tile(w, n);
  }

  // Numbers that the constructor takes from `memory`.
  static int64_t size(const Shape& shape, const Form& form, bool backward) {
    const Head counted(shape, form, backward, nullptr);
    return counted.used_;
  }

  // Chunk after chunk. `starts`, unless it is null, receives the states at their starts.
  void run(const Given<T>& given, const Ends<T>& ends, T* starts) {
    load_all(given);
    for (int64_t n = 0; n < s_.segments; ++n) {
      if (starts) store(running_, starts + n * s_.state());
      const Segment& segment = s_.segment[n];
      anchor(segment);
      load_inputs(given, segment);
      forward<false>(segment.length);
      store_columns(out_, ends.out + segment.begin, segment.length);
      finish();
    }
    store(running_, ends.w2, ends.w1, ends.memory_w2, ends.memory_w1);
    store(anchor_, ends.anchor_w2, ends.anchor_w1, ends.memory_anchor_w2, ends.memory_anchor_w1);
  }

  // The gradients, from the last chunk to the first.
  void run_back(const Given<T>& given, const Ends<const T>& grads, const T* starts,
                const Gradients<T>& to) {
    load_all(given);
    for (Weights* each : {&d_running_, &d_anchor_, &d_initial_}) zero(*each);
    load(d_running_, grads.w2, grads.w1, grads.memory_w2, grads.memory_w1);
    load(d_anchor_, grads.anchor_w2, grads.anchor_w1, grads.memory_anchor_w2,
         grads.memory_anchor_w1);
    for (int i = 0; i < 6; ++i) d_gates_[i] = 0;
    for (int64_t n = s_.segments; n-- > 0;) {
      const Segment& segment = s_.segment[n];
      load(running_, starts + n * s_.state());
      load_anchor(given, starts, segment);
      load_inputs(given, segment);
      forward<true>(segment.length);
      zero(d_out_);
      if (grads.out) load_columns(d_out_, grads.out + segment.begin, segment.length);
      backward(segment.length);
      std::swap(d_running_, d_before_);
      if (segment.anchors_generators) merge_anchor_gradient(0, 4);
      if (segment.anchors_memory) merge_anchor_gradient(4, 1);
      store_columns(d_x_key_, to.key + segment.begin, segment.length);
      store_columns(d_x_value_, to.value + segment.begin, segment.length);
      store_columns(d_query_, to.query + segment.begin, segment.length);
    }
    store(d_running_, to.w2, to.w1, to.memory_w2, to.memory_w1);
    store(d_anchor_, to.anchor_w2, to.anchor_w1, to.memory_anchor_w2, to.memory_anchor_w1);
    store(d_initial_, to.initial);
    for (int i = 0; i < 6; ++i) to.gates[i] = d_gates_[i];
  }

 private:
  struct Weights {
    Tile<T> w2;  // of five memories, one under the other
    Tile<T> w1, memory_w1;  // of the four that generate, one under the other, and of the fifth
  };
  struct Rates {
    T *eta, *erase, *delta;
    T *kept, *pulled;  // b_{t-1} and 1 - b_{t-1}
    T* end;            // b_C / b_t
    T* log_b;          // from b_0 on
    T all_kept, all_pulled;
  };

  static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }
  T* take(int64_t count) {
    T* taken = memory_ ? memory_ + used_ : nullptr;
    used_ += padded(count) + 16;  // a line apart: addresses that agree in 12 bits hinder each other
    return taken;
  }
  Tile<T> tile(int64_t rows, int64_t columns) {
    columns = padded(columns);
    return {take(rows * columns), rows, columns, columns};
  }
  Weights weights() {
    return {tile(s_.rows(), s_.dim), tile(4 * s_.dim, s_.hidden), tile(s_.dim, s_.memory_hidden)};
  }

  static void zero(const Tile<T>& x) { std::fill_n(x.at, x.rows * x.row, T(0)); }
  static void zero(const Weights& x) { zero(x.w2), zero(x.w1), zero(x.memory_w1); }

  Tile<T> w2(const Weights& x, int m, int count = 1) const {
    return of_hidden(x.w2, m, count);
  }
  Tile<T> w1(const Weights& x, int m, int count = 1) const {
    return m < 4 ? x.w1.part(m * s_.dim, count * s_.dim) : x.memory_w1;
  }
  int64_t hidden(int m) const { return m < 4 ? s_.hidden : s_.memory_hidden; }
  Tile<T> of_hidden(const Tile<T>& x, int m, int count = 1) const {
    return x.part(m * s_.hidden, count * hidden(m));
  }
  Tile<T> f_t(int m) const { return m < 4 ? gen_f_t_ : memory_f_t_; }
  Tile<T> t_h(int m) const { return t_h_.part(0, hidden(m)); }
  Tile<T> u_h(int m) const { return u_h_.part(0, hidden(m)); }
  Tile<T> of_dim(const Tile<T>& x, int m, int count = 1) const {
    return x.part(m * s_.dim, count * s_.dim);
  }

  // Where the W1 of a memory begin in a state: after all W2, and those of earlier memories.
  int64_t w1_at(int m) const { return s_.dim * (s_.rows() + m * s_.hidden); }

  // Copies to and from the caller's tensors, whose rows have no gaps.
  template <class From>
  static void load(const Tile<T>& to, From* from, int64_t columns) {
    if (!from) return;
    for (int64_t i = 0; i < to.rows; ++i) std::copy_n(from + i * columns, columns, to[i]);
  }
  static void store(const Tile<T>& from, T* to, int64_t columns) {
    for (int64_t i = 0; i < from.rows; ++i) std::copy_n(from[i], columns, to + i * columns);
  }
  void load(const Weights& to, const T* gen2, const T* gen1, const T* mem2, const T* mem1) const {
    load(w2(to, 0, 4), gen2, s_.dim), load(w1(to, 0, 4), gen1, s_.hidden);
    load(w2(to, 4), mem2, s_.dim), load(to.memory_w1, mem1, s_.memory_hidden);
  }
  void store(const Weights& from, T* gen2, T* gen1, T* mem2, T* mem1) const {
    store(w2(from, 0, 4), gen2, s_.dim), store(w1(from, 0, 4), gen1, s_.hidden);
    store(w2(from, 4), mem2, s_.dim), store(from.memory_w1, mem1, s_.memory_hidden);
  }
  void load(const Weights& to, const T* from) const {
    load(to.w2, from, s_.dim), load(to.w1, from + w1_at(0), s_.hidden);
    load(to.memory_w1, from + w1_at(4), s_.memory_hidden);
  }
  void store(const Weights& from, T* to) const {
    store(from.w2, to, s_.dim), store(from.w1, to + w1_at(0), s_.hidden);
    store(from.memory_w1, to + w1_at(4), s_.memory_hidden);
  }
  void load_columns(const Tile<T>& to, const T* from, int64_t count) const {
    for (int64_t i = 0; i < to.rows; ++i) {
      std::copy_n(from + i * s_.tokens, count, to[i]);
      std::fill(to[i] + count, to[i] + to.columns, T(0));
    }
  }
  void store_columns(const Tile<T>& from, T* to, int64_t count) const {
    for (int64_t i = 0; i < from.rows; ++i) std::copy_n(from[i], count, to + i * s_.tokens);
  }
  void load_all(const Given<T>& given) {
    gates_ = given.gates;
    load(running_, given.w2, given.w1, given.memory_w2, given.memory_w1);
    load(anchor_, given.anchor_w2, given.anchor_w1, given.memory_anchor_w2,
         given.memory_anchor_w1);
    zero(initial_);
    load(initial_, given.initial_w2, given.initial_w1, given.memory_initial_w2,
         given.memory_initial_w1);
  }
  void load_inputs(const Given<T>& given, const Segment& segment) {
    load_columns(x_key_, given.key + segment.begin, segment.length);
    load_columns(x_value_, given.value + segment.begin, segment.length);
    load_columns(query_, given.query + segment.begin, segment.length);
  }
  static void copy(const Tile<T>& to, const Tile<T>& from) {
    std::copy_n(from.at, from.rows * from.row, to.at);
  }
  // Moves the anchor to the running weights if a chunk begins with this segment (Eq 90).
  void anchor(const Segment& segment) {
    if (segment.anchors_generators && segment.anchors_memory) {
      anchor_ = running_;
      return;
    }
    if (segment.anchors_generators) {
      copy(w2(anchor_, 0, 4), w2(running_, 0, 4)), copy(w1(anchor_, 0, 4), w1(running_, 0, 4));
    }
    if (segment.anchors_memory) {
      copy(w2(anchor_, 4), w2(running_, 4)), copy(w1(anchor_, 4), w1(running_, 4));
    }
  }
  // Weights that are neither the running ones nor the anchor.
  Weights spare() const {
    for (const Weights& each : buffers_) {
      if (each.w1.at != running_.w1.at && each.w1.at != anchor_.w1.at) return each;
    }
    return {};
  }
  // The anchors of a segment: the states at the starts of earlier ones, or those given.
  void load_anchor(const Given<T>& given, const T* starts, const Segment& segment) {
    if (segment.anchors_generators && segment.anchors_memory) {
      anchor_ = running_;
      return;
    }
    if (anchor_.w1.at == running_.w1.at) anchor_ = spare();
    if (segment.generators_anchor < 0) {
      load(w2(anchor_, 0, 4), given.anchor_w2, s_.dim);
      load(w1(anchor_, 0, 4), given.anchor_w1, s_.hidden);
    } else {
      const T* from = starts + segment.generators_anchor * s_.state();
      load(w2(anchor_, 0, 4), from, s_.dim), load(w1(anchor_, 0, 4), from + w1_at(0), s_.hidden);
    }
    if (segment.memory_anchor < 0) {
      load(w2(anchor_, 4), given.memory_anchor_w2, s_.dim);
      load(w1(anchor_, 4), given.memory_anchor_w1, s_.memory_hidden);
    } else {
      const T* from = starts + segment.memory_anchor * s_.state();
      load(w2(anchor_, 4), from + 4 * s_.hidden * s_.dim, s_.dim);
      load(w1(anchor_, 4), from + w1_at(4), s_.memory_hidden);
    }
  }
  // A chunk begins here, where the anchor became a copy of the running weights: its gradient is
  // added to theirs.
  void merge_anchor_gradient(int m, int count) {
    for (auto [to, from] : {std::pair{w2(d_running_, m, count), w2(d_anchor_, m, count)},
                            std::pair{w1(d_running_, m, count), w1(d_anchor_, m, count)}}) {
      each(1, to.rows * to.row, [&](int64_t, int64_t j) { to.at[j] += from.at[j]; });
      zero(from);
    }
  }

#include "memories_forward.h"
#include "memories_backward.h"

  const Shape& s_;
  const Form& form_;
  T* memory_;
  int64_t used_ = 0, width_, count_ = 0;
  const T* gates_ = nullptr;
  T d_gates_[6];
  Weights buffers_[3], running_, anchor_, initial_, d_running_, d_before_, d_anchor_, d_initial_;

  // A suffix 2 or 1 says W2 or W1 of mem. d_x is the gradient of x, and x_t is x transposed (input_t
  // one of the three inputs). t_d, t_h, u_d, u_h, square, sum and sum2 are scratch. In order:
  //   x_key, x_value, query  inputs                made           channels of the four generators
  //   gen_f, gen_s           their features, and the slopes of gelu there
  //   kv                     keys | values (the left half | the right half)
  //   f, slopes              f and gelu' of all five memories, at keys | values
  //   bend                   gelu'' of all five, at keys, in the backward pass alone
  //   n, fp                  what f was multiplied by, and f^T p
  //   read, hat, error       W1 f(k) | v + W1 f(v), v^, and k + W1 f(k) - v^
  //   scaled, p, slope       r = eta error, p = W1^T r, and the column of dL/dW2
  //   decay                  b_{j-1} / b_i for a later token j, 0 for others
  //   v, v1                  V of the keys and of the features: L without its rates
  //   ..._inverse            T for one of the rates
  //   r, z                   R and Z               keep, pull     K and Pi
  //   ka, kb                 Y E B_0 and Y E (I - B_0)
  //   h, i, x                X_s y, X_0 y, and what the tokens write less what they erase
  //   a, b, m                X_s q, X_0 q, and the decayed similarities of keys and queries
  //   fq, sq, nq             features of the query, slopes of gelu there, and their n
  Tile<T> x_key_, x_value_, query_, gen_f_, gen_s_, made_, kv_, f_, slopes_, bend_, read_, hat_, error_;
  Tile<T> scaled_, p_, slope_, decay_, v_, v1_, eta_inverse_, erase_inverse_, delta_inverse_;
  Tile<T> m1_, m2_, square_, square_t_, kv_t_, r_, z_, gen_f_t_, memory_f_t_, ka_, kb_, keep_, pull_;
  Tile<T> h2_, i2_, x2_, a2_, b2_, fq_, sq_, t_h_, u_h_, h1_, i1_, x1_, a1_, b1_, out_, t_d_, u_d_;
  Tile<T> d_kv_, d_f_, d_read_, d_slope_, d_scaled_, d_made_, d_r_, d_z_, r_t_;
  Tile<T> d_fq_, fq_t_;
  Matrix mem_w2_, mem_w1_;
  Tile<T> d_keep_, d_pull_, dd_t_, input_t_, d_x2_, d_x1_, d_out_, d_query_, d_x_key_, d_x_value_;
  T *gen_n_[4], *n_[5], *hat_n_[5], *fp_[5], *key_n_, *value_n_, *nq_, *sum_, *sum2_;
  Rates rate_, d_rate_;
  T *sig_keep_, *sig_eta_, *sig_erase_, *sig_delta_;
};
