  // The forward half of the class Head: a part of memories_level.h. It fills the tiles of a chunk;
  // `forward` has the order.

  // Everything of a chunk but the weights at its end.
  template <bool kBackward>
  void forward(int64_t count) {
    count_ = count;
    generate();
    set_rates();
    surprise<kBackward>();
    transitions();
    matrices();
    for (const Matrix* each : {&mem_w2_, &mem_w1_}) solve(*each);
    read();
  }

  // Eq 83: the channels that the generating memories make, and keys and values of them.
  void generate() {
    for (int g = 0; g < 4; ++g) {
      const Tile<T> f = of_hidden(gen_f_, g), made = of_dim(made_, g);
      multiply<kSet>(f, w2(anchor_, g).left(), s_.dim, g == 1 ? x_value_ : x_key_);
      features<false>(f, of_hidden(gen_s_, g), f, gen_n_[g], form_.generator_floor);
      copy(made, g == 1 ? x_value_ : x_key_);
      multiply<kAdd>(made, w1(anchor_, g).left(), s_.hidden, f);
    }
    unit(kv_.half(0), of_dim(made_, 0), key_n_);
    unit(kv_.half(1), of_dim(made_, 1), value_n_);
    transpose(kv_t_, kv_);
  }

  // Replaces h by f = unit(activation(h)). Also returns the slopes of the activation, the n that f
  // was multiplied by and, for the backward pass, the slopes of the slopes.
  template <bool kBend>
  void features(Tile<T> f, Tile<T> slope, Tile<T> bend, T* n, T floor) {
    T* sum = sum_;
    each(f.columns, [=](int64_t j) { sum[j] = floor; });
    for (int64_t i = 0; i < f.rows; ++i) {
      T *at = f[i], *s = slope[i], *b = bend[i];
      each(f.columns, [=](int64_t j) {
        const Activation<T> a = activation(at[j]);
        at[j] = a.value, s[j] = a.slope;
        if (kBend) b[j] = a.bend;
        sum[j] += a.value * a.value;
      });
    }
    each(f.columns, [=](int64_t j) { n[j] = T(1) / root(sum[j]); });
    each(f.rows, f.columns, [=](int64_t i, int64_t j) { f[i][j] *= n[j]; });
  }

  void unit(Tile<T> to, Tile<T> from, T* n) {
    T* sum = sum_;
    each(to.columns, [=](int64_t j) { sum[j] = T(1e-6); });
    each(to.rows, to.columns, [=](int64_t i, int64_t j) { sum[j] += from[i][j] * from[i][j]; });
    each(to.columns, [=](int64_t j) { n[j] = T(1) / root(sum[j]); });
    each(to.rows, to.columns, [=](int64_t i, int64_t j) { to[i][j] = from[i][j] * n[j]; });
  }

  // Rows of the channels of M_alpha: those of the retention, and of either erasure.
  int64_t third() const { return s_.dim / 3; }
  int64_t kept_channels() const { return s_.dim - 2 * third(); }

  void pool(T* to, Tile<T> from) {
    const T scale = T(1) / root(T(from.rows));
    each(from.columns, [=](int64_t j) { to[j] = 0; });
    each(from.rows, from.columns, [=](int64_t i, int64_t j) { to[j] += from[i][j]; });
    each(from.columns, [=](int64_t j) { to[j] *= scale; });
  }

  void set_rates() {
    const Tile<T> alpha = of_dim(made_, 3);
    pool(sig_eta_, of_dim(made_, 2));
    pool(sig_keep_, alpha.part(0, kept_channels()));
    pool(sig_erase_, alpha.part(kept_channels(), third()));
    pool(sig_delta_, alpha.part(kept_channels() + third(), third()));
    const T erase_range = T(1.1) * sigmoid(gates_[kEraseRange]);
    const T delta_range = T(1.1) * sigmoid(gates_[kDeltaRange]);
    T* log_b = rate_.log_b;
    log_b[0] = 0;
    for (int64_t j = 0; j < width_; ++j) {
      const bool there = j < count_;
      const T retention = sig_keep_[j] + gates_[kAlpha];
      sig_eta_[j] = sigmoid(sig_eta_[j] + gates_[kEta]);
      sig_keep_[j] = sigmoid(retention);
      sig_erase_[j] = sigmoid(T(form_.sharpness) * sig_erase_[j] + gates_[kErase]);
      sig_delta_[j] = sigmoid(T(form_.sharpness) * sig_delta_[j] + gates_[kDelta]);
      const T half = there ? (T(1) + sig_keep_[j]) / 2 : T(0);
      rate_.eta[j] = form_.max_eta * half * sig_eta_[j];
      rate_.erase[j] = form_.max_erase * half * at_most_1(erase_range * sig_erase_[j]);
      rate_.delta[j] = form_.max_delta * half * at_most_1(delta_range * sig_delta_[j]);
      log_b[j + 1] = log_b[j] + (there ? log_sigmoid(retention) : T(0));
      rate_.kept[j] = there ? std::exp(log_b[j]) : T(0);
      rate_.pulled[j] = there ? -std::expm1(log_b[j]) : T(0);
    }
    for (int64_t i = 0; i < width_; ++i) {
      rate_.end[i] = i < count_ ? std::exp(log_b[count_] - log_b[i + 1]) : T(0);
    }
    rate_.all_kept = std::exp(log_b[count_]), rate_.all_pulled = -std::expm1(log_b[count_]);
    for (int64_t i = 0; i < count_; ++i) {
      T* row = decay_[i];
      const T from = log_b[i + 1];
      each(width_, [=](int64_t j) {
        const T past = log_b[j] - from;
        row[j] = j > i ? decay(past < 0 ? past : T(0)) : T(0);
      });
    }
  }

  // The gradients at the anchor, factored: `scaled_` is the error, `slope_` its gradient in W2 k.
  template <bool kBackward>
  void surprise() {
    const T* eta = rate_.eta;
    const Tile<T> key = kv_.half(0), value = kv_.half(1);
    for (int m = 0; m < 5; ++m) {
      const Tile<T> both = of_hidden(f_, m), f = both.half(0), slopes = of_hidden(slopes_, m);
      multiply<kSet>(both, w2(anchor_, m).left(), s_.dim, kv_);
      const Tile<T> bend = kBackward ? of_hidden(bend_, m) : f;
      const T floor = m < 4 ? form_.generator_floor : form_.memory_floor;
      features<kBackward>(f, slopes.half(0), bend, n_[m], floor);
      features<false>(both.half(1), slopes.half(1), f, n_[m] + width_, floor);
      const Tile<T> read = of_dim(read_, m), found = read.half(0), refined = read.half(1);
      multiply<kSet>(read, w1(anchor_, m).left(), both.rows, both);
      each(s_.dim, width_, [=](int64_t i, int64_t j) { refined[i][j] += value[i][j]; });
      const Tile<T> hat = of_dim(hat_, m), error = of_dim(error_, m), scaled = of_dim(scaled_, m);
      unit(hat, refined, hat_n_[m]);
      each(s_.dim, width_, [=](int64_t i, int64_t j) {
        error[i][j] = key[i][j] + found[i][j] - hat[i][j];
        scaled[i][j] = eta[j] * error[i][j];
      });
      const Tile<T> p = of_hidden(p_, m), slope = of_hidden(slope_, m), s = slopes.half(0);
      multiply<kSet>(p, w1(anchor_, m).transposed(), s_.dim, scaled);
      T *fp = fp_[m], *n = n_[m];
      each(width_, [=](int64_t j) { fp[j] = 0; });
      each(f.rows, width_, [=](int64_t i, int64_t j) { fp[j] += f[i][j] * p[i][j]; });
      each(f.rows, width_, [=](int64_t i, int64_t j) {
        slope[i][j] = s[i][j] * n[j] * (p[i][j] - f[i][j] * fp[j]);
      });
    }
  }

  // v = the decayed similarities of the columns of y with those of x, of which later tokens have 0.
  void similarity(Tile<T> v, Tile<T> y, Tile<T> x) {
    const Tile<T> decays = decay_;
    multiply<kSet>(v.part(0, count_), y.transposed(), y.rows, x);
    each(count_, width_, [=](int64_t i, int64_t j) { v[i][j] *= decays[i][j]; });
  }

  // to = (I + v diag(rate))^-1, upper triangular, from its last row up.
  void invert(Tile<T> to, Tile<T> v, const T* rate) {
    typedef typename Register<T>::Vector Vector;
    constexpr int64_t kLanes = kBytes / sizeof(T);
    T* factors = sum_;
    for (int64_t i = count_; i-- > 0;) {
      each(width_, [=](int64_t j) { factors[j] = -v[i][j] * rate[j]; });
      std::fill_n(to[i], width_, T(0));
      to[i][i] = 1;
      for (int64_t j = i / kLanes * kLanes; j < width_; j += kLanes) {
        Vector sums[2];
        memcpy(&sums[0], to[i] + j, sizeof(Vector));
        sums[1] = Vector{};
        const int64_t last = std::min(count_, j + kLanes);
        int64_t k = i + 1;
        for (; k + 2 <= last; k += 2) {
          Vector rows[2];
          memcpy(&rows[0], to[k] + j, sizeof(Vector));
          memcpy(&rows[1], to[k + 1] + j, sizeof(Vector));
          sums[0] = multiply_add<T>(factors[k], rows[0], sums[0]);
          sums[1] = multiply_add<T>(factors[k + 1], rows[1], sums[1]);
        }
        if (k < last) {
          Vector row;
          memcpy(&row, to[k] + j, sizeof(Vector));
          sums[0] = multiply_add<T>(factors[k], row, sums[0]);
        }
        sums[0] += sums[1];
        memcpy(to[i] + j, &sums[0], sizeof(Vector));
      }
    }
  }

  // The W2 of the generating memories at the end of the chunk are W2 keep + W2_0 pull - slope r,
  // all with the same three matrices on the right.
  void transitions() {
    const Tile<T> key = kv_.half(0), key_t = kv_t_, z = z_, ka = ka_, kb = kb_;
    const T *eta = rate_.eta, *kept = rate_.kept, *pulled = rate_.pulled, *end = rate_.end;
    similarity(v_, key, key);
    invert(eta_inverse_, v_, rate_.eta);
    each(count_, z.row, [=](int64_t i, int64_t j) { z[i][j] = end[i] * key_t[i][j]; });
    multiply<kSet>(r_.part(0, count_), eta_inverse_.left(), count_, z_);
    each(s_.dim, width_, [=](int64_t i, int64_t j) {
      const T scaled = eta[j] * key[i][j];
      ka[i][j] = kept[j] * scaled;
      kb[i][j] = pulled[j] * scaled;
    });
    zero(keep_), zero(pull_);
    for (int64_t i = 0; i < s_.dim; ++i) keep_[i][i] = rate_.all_kept, pull_[i][i] = rate_.all_pulled;
    multiply<kSubtract>(keep_, ka_.left(), count_, r_);
    multiply<kSubtract>(pull_, kb_.left(), count_, r_);
  }

  // One of the two matrices of mem, with what it sees, writes and erases.
  struct Matrix {
    Tile<T> running, initial;
    Tile<T> key;          // what it sees of the tokens
    Tile<T> similarity, inverse;
    const T* rate;        // of its erasure
    Tile<T> seen, initial_seen;  // X y of the running and of the initial weights
    Tile<T> written;      // what tokens write, less what they erase
    Tile<T> query;        // what reads it
    Tile<T> a, b, mask;   // X q of both, and the decayed similarities of keys and queries
    Tile<T> result;
    Tile<T> scratch, scratch2;  // as large as `written`
    // These are filled only in the backward pass.
    Tile<T> d_running, d_before, d_initial, d_key, key_t, d_written;
    T* d_rate;
  };

  void matrices() {
    const Tile<T> feature = of_hidden(f_, 4).half(0);
    mem_w2_ = {w2(running_, 4), w2(initial_, 4), kv_.half(0), v_,   erase_inverse_, rate_.erase,
               h2_,             i2_,             x2_,         query_, a2_,          b2_,
               m2_,             fq_,             t_h(4),      u_h(4)};
    mem_w1_ = {w1(running_, 4), w1(initial_, 4), feature, v1_, delta_inverse_, rate_.delta,
              h1_,             i1_,             x1_,     fq_, a1_,            b1_,
              m1_,             out_,            t_d_,    u_d_};
    similarity(v1_, feature, feature);
  }

  void solve(const Matrix& m) {
    invert(m.inverse, m.similarity, m.rate);
    multiply<kSet>(m.seen, m.running.left(), m.key.rows, m.key);
    multiply<kSet>(m.initial_seen, m.initial.left(), m.key.rows, m.key);
    const Tile<T> right = m.scratch, seen = m.seen, first = m.initial_seen;
    const Tile<T> slope = of_hidden(slope_, 4);
    const Tile<T> key = kv_.half(0), value = kv_.half(1);
    const T *rate = m.rate, *kept = rate_.kept, *pulled = rate_.pulled;
    if (is_w2(m)) {
      each(right.rows, width_, [=](int64_t i, int64_t j) {
        right[i][j] = -slope[i][j] - rate[j] * (kept[j] * seen[i][j] + pulled[j] * first[i][j]);
      });
    } else {
      each(right.rows, width_, [=](int64_t i, int64_t j) {
        right[i][j] = rate[j] * (value[i][j] - key[i][j] - kept[j] * seen[i][j] -
                                 pulled[j] * first[i][j]);
      });
    }
    multiply<kSet>(m.written, right.left(), count_, m.inverse);
  }
  bool is_w2(const Matrix& m) const { return &m == &mem_w2_; }

  // o_t = M_{t-1}(q_t).
  void read() {
    read_through(mem_w2_);
    features<false>(fq_, sq_, fq_, nq_, form_.memory_floor);
    read_through(mem_w1_);
    const Tile<T> out = out_, query = query_;
    each(s_.dim, width_, [=](int64_t i, int64_t j) { out[i][j] += query[i][j]; });
  }
  void read_through(const Matrix& m) {
    multiply<kSet>(m.a, m.running.left(), m.query.rows, m.query);
    multiply<kSet>(m.b, m.initial.left(), m.query.rows, m.query);
    similarity(m.mask, m.key, m.query);
    const Tile<T> to = m.result, a = m.a, b = m.b;
    const T *kept = rate_.kept, *pulled = rate_.pulled;
    each(to.rows, width_, [=](int64_t i, int64_t j) {
      to[i][j] = kept[j] * a[i][j] + pulled[j] * b[i][j];
    });
    multiply<kAdd>(to, m.written.left(), count_, m.mask);
  }

  // to = x diag(scale)
  void scale(Tile<T> to, Tile<T> x, const T* by) {
    each(to.rows, width_, [=](int64_t i, int64_t j) { to[i][j] = x[i][j] * by[j]; });
  }

  // The running weights at the end of the chunk.
  void finish() {
    const Weights next = spare();
    const T kept = rate_.all_kept, pulled = rate_.all_pulled;
    const auto fade = [=](Tile<T> to, Tile<T> x, Tile<T> first) {
      each(x.rows, x.row, [=](int64_t i, int64_t j) {
        to[i][j] = kept * x[i][j] + pulled * first[i][j];
      });
    };
    for (int m = 0; m < 5; ++m) {
      const Tile<T> to = w1(next, m);
      fade(to, w1(running_, m), w1(initial_, m));
      const Tile<T> feature_t = f_t(m);
      transpose(feature_t.part(0, width_), of_hidden(f_, m).half(0));
      scale(t_d_, m < 4 ? of_dim(scaled_, m) : x1_, rate_.end);
      if (m < 4) multiply<kSubtract>(to, t_d_.left(), count_, feature_t);
      if (m == 4) multiply<kAdd>(to, t_d_.left(), count_, feature_t);
    }
    for (int g = 0; g < 4; ++g) {
      const Tile<T> to = w2(next, g);
      multiply<kSet>(to, w2(running_, g).left(), s_.dim, keep_);
      multiply<kAdd>(to, w2(initial_, g).left(), s_.dim, pull_);
      multiply<kSubtract>(to, of_hidden(slope_, g).left(), count_, r_);
    }
    fade(w2(next, 4), w2(running_, 4), w2(initial_, 4));
    scale(t_h(4), x2_, rate_.end);
    multiply<kAdd>(w2(next, 4), t_h(4).left(), count_, kv_t_);
    running_ = next;
  }
