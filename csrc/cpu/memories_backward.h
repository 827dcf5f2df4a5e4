  // The backward half of the class Head: a part of memories_level.h. Its functions reverse those of
  // memories_forward.h, from the last to the first.

  // From the gradients of the outputs (d_out_), of the weights at the end (d_running_) and of the
  // anchors (d_anchor_) to those of the weights at the start (d_before_) and of all else.
  void backward(int64_t count) {
    zero(d_kv_), zero(d_f_), zero(of_dim(d_scaled_, 4)), zero(d_query_);
    for (T* each : {d_rate_.eta, d_rate_.erase, d_rate_.delta, d_rate_.kept, d_rate_.pulled,
                    d_rate_.end}) {
      std::fill_n(each, width_, T(0));
    }
    std::fill_n(d_rate_.log_b, width_ + 1, T(0));
    d_rate_.all_kept = d_rate_.all_pulled = 0;
    fade_back(d_before_.w1, d_running_.w1, running_.w1, initial_.w1, d_initial_.w1);
    fade_back(d_before_.memory_w1, d_running_.memory_w1, running_.memory_w1, initial_.memory_w1,
              d_initial_.memory_w1);
    fade_back(w2(d_before_, 4), w2(d_running_, 4), w2(running_, 4), w2(initial_, 4),
              w2(d_initial_, 4));
    memory_back();
    generators_back();
    for (int m = 0; m < 5; ++m) surprise_back(m);
    generate_back();
  }

  static T dot(const T* a, const T* b, int64_t count) {
    typedef typename Register<T>::Vector Vector;
    constexpr int64_t kLanes = kBytes / sizeof(T);
    Vector sum = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      Vector x, y;
      memcpy(&x, a + j, sizeof x);
      memcpy(&y, b + j, sizeof y);
      sum += x * y;
    }
    T total = 0;
    for (int64_t k = 0; k < kLanes; ++k) total += sum[k];
    return total;
  }

  // x = kept x + pulled x_0
  void fade_back(Tile<T> d_before, Tile<T> d, Tile<T> x, Tile<T> first, Tile<T> d_first) {
    const T kept = rate_.all_kept, pulled = rate_.all_pulled;
    const int64_t columns = d.row;
    for (int64_t i = 0; i < d.rows; ++i) {
      d_rate_.all_kept += dot(d[i], x[i], columns);
      d_rate_.all_pulled += dot(d[i], first[i], columns);
    }
    each(d.rows, columns, [=](int64_t i, int64_t j) {
      d_before[i][j] = kept * d[i][j];
      d_first[i][j] += pulled * d[i][j];
    });
  }

  // Tokens by tokens, with zeros beyond the tokens.
  Tile<T> flipped(Tile<T> from) {
    if (count_ < width_) zero(square_t_);
    transpose(square_t_.part(0, count_), from.part(0, count_));
    return square_t_;
  }

  // The gradients of logarithms b from the gradient d of decayed similarities v.
  void decays_back(Tile<T> d, Tile<T> v) {
    T* log_b = d_rate_.log_b;
    for (int64_t i = 0; i < count_; ++i) {
      const T *of = d[i], *at = v[i];
      log_b[i + 1] -= dot(of, at, width_);
      each(width_, [=](int64_t j) { log_b[j] += of[j] * at[j]; });
    }
  }

  // Backward of U = v diag(rate), the part of the system above the diagonal. On entry d is minus the
  // gradient of U. On exit it is G + G^T, with G the gradient of the similarities y_i^T y_j. Adds to
  // the gradients of the rate and of log b.
  void system_back(Tile<T> d, Tile<T> v, const T* rate, T* d_rate) {
    T* log_b = d_rate_.log_b;
    for (int64_t i = 0; i < count_; ++i) {
      T *of = d[i], *decays = decay_[i], *product = sum_;
      const T* at = v[i];
      each(width_, [=](int64_t j) {
        const T change = -of[j] * at[j];
        d_rate[j] += change;
        product[j] = change;
        log_b[j] += change * rate[j];
        of[j] *= -decays[j] * rate[j];
      });
      log_b[i + 1] -= dot(product, rate, width_);
    }
    const Tile<T> other = flipped(d);
    each(count_, width_, [=](int64_t i, int64_t j) { d[i][j] += other[i][j]; });
  }

  void memory_back() {
    const Tile<T> d_feature = of_hidden(d_f_, 4).half(0);
    transpose(memory_f_t_, of_hidden(f_, 4));
    mem_w2_.d_running = w2(d_running_, 4), mem_w2_.d_before = w2(d_before_, 4);
    mem_w2_.d_initial = w2(d_initial_, 4), mem_w2_.d_key = d_kv_.half(0), mem_w2_.key_t = kv_t_;
    mem_w2_.d_written = d_x2_, mem_w2_.d_rate = d_rate_.erase;
    mem_w1_.d_running = w1(d_running_, 4), mem_w1_.d_before = w1(d_before_, 4);
    mem_w1_.d_initial = w1(d_initial_, 4), mem_w1_.d_key = d_feature, mem_w1_.key_t = memory_f_t_;
    mem_w1_.d_written = d_x1_, mem_w1_.d_rate = d_rate_.delta;
    copy(d_query_, d_out_);
    zero(d_fq_);
    read_back(mem_w1_, d_out_, d_fq_, fq_t_);
    features_back(d_fq_, d_fq_, fq_, sq_, nq_, nullptr);
    read_back(mem_w2_, d_fq_, d_query_, input_t_);
    for (const Matrix* each : {&mem_w1_, &mem_w2_}) end_back(*each), solve_back(*each);
  }

  // The gradients of a read, to = kept X q + pulled X_0 q + written mask.
  void read_back(const Matrix& m, Tile<T> d, Tile<T> d_query, Tile<T> query_t) {
    const Tile<T> t = m.scratch, u = m.scratch2, a = m.a, b = m.b, square = square_, decays = decay_;
    const T *kept = rate_.kept, *pulled = rate_.pulled;
    T *d_kept = d_rate_.kept, *d_pulled = d_rate_.pulled;
    for (int64_t i = 0; i < d.rows; ++i) {
      each(width_, [=](int64_t j) {
        d_kept[j] += d[i][j] * a[i][j];
        d_pulled[j] += d[i][j] * b[i][j];
        t[i][j] = kept[j] * d[i][j];
        u[i][j] = pulled[j] * d[i][j];
      });
    }
    transpose(query_t, m.query);
    multiply<kAdd>(m.d_before, t.left(), count_, query_t);
    multiply<kAdd>(m.d_initial, u.left(), count_, query_t);
    multiply<kAdd>(d_query, m.running.transposed(), d.rows, t);
    multiply<kAdd>(d_query, m.initial.transposed(), d.rows, u);
    multiply<kSet>(square_.part(0, count_), m.written.transposed(), d.rows, d);
    decays_back(square_, m.mask);
    each(count_, width_, [=](int64_t i, int64_t j) { square[i][j] *= decays[i][j]; });
    multiply<kAdd>(d_query, m.key.left(), count_, square_);
    multiply<kAdd>(m.d_key, m.query.left(), count_, flipped(square_));
    multiply<kSet>(m.d_written, d.left(), count_, flipped(m.mask));
  }

  // The gradients of what the end holds of a chunk, X_C = ... + written diag(end) key^T.
  void end_back(const Matrix& m) {
    const Tile<T> t = m.scratch, u = m.scratch2, d_written = m.d_written, written = m.written;
    const T* end = rate_.end;
    T* d_end = d_rate_.end;
    multiply<kSet>(t, m.d_running.left(), m.key.rows, m.key);
    each(t.rows, width_, [=](int64_t i, int64_t j) {
      d_written[i][j] += end[j] * t[i][j];
      d_end[j] += written[i][j] * t[i][j];
      u[i][j] = written[i][j] * end[j];
    });
    multiply<kAdd>(m.d_key, m.d_running.transposed(), t.rows, u);
  }

  // The gradients of the triangular system, written (I + v diag(rate)) = right.
  void solve_back(const Matrix& m) {
    const Tile<T> t = m.scratch, u = m.scratch2, seen = m.seen, first = m.initial_seen;
    const Tile<T> key = kv_.half(0), value = kv_.half(1);
    const Tile<T> d_key = d_kv_.half(0), d_value = d_kv_.half(1), d_slope = of_hidden(d_slope_, 4);
    const T *kept = rate_.kept, *pulled = rate_.pulled, *rate = m.rate;
    T *d_kept = d_rate_.kept, *d_pulled = d_rate_.pulled, *d_rate = m.d_rate;
    multiply<kSet>(t, m.d_written.left(), count_, flipped(m.inverse));
    multiply<kSet>(square_.part(0, count_), m.written.transposed(), t.rows, t);
    system_back(square_, m.similarity, m.rate, m.d_rate);
    multiply<kAdd>(m.d_key, m.key.left(), count_, square_);
    if (is_w2(m)) {
      each(t.rows, width_, [=](int64_t i, int64_t j) { d_slope[i][j] = -t[i][j]; });
    } else {
      each(t.rows, width_, [=](int64_t i, int64_t j) {
        const T change = rate[j] * t[i][j];
        d_rate[j] += t[i][j] * (value[i][j] - key[i][j]);
        d_value[i][j] += change;
        d_key[i][j] -= change;
      });
    }
    each(t.rows, width_, [=](int64_t i, int64_t j) {
      const T d = t[i][j], change = -rate[j] * d;
      d_rate[j] -= d * (kept[j] * seen[i][j] + pulled[j] * first[i][j]);
      d_kept[j] += change * seen[i][j];
      d_pulled[j] += change * first[i][j];
      t[i][j] = kept[j] * change;
      u[i][j] = pulled[j] * change;
    });
    multiply<kAdd>(m.d_before, t.left(), count_, m.key_t);
    multiply<kAdd>(m.d_initial, u.left(), count_, m.key_t);
    multiply<kAdd>(m.d_key, m.running.transposed(), t.rows, t);
    multiply<kAdd>(m.d_key, m.initial.transposed(), t.rows, u);
  }

  // The generating memories at the end of the chunk.
  void generators_back() {
    const T* end = rate_.end;
    T* d_end = d_rate_.end;
    for (int g = 0; g < 4; ++g) {
      const Tile<T> d = w1(d_running_, g), scaled = of_dim(scaled_, g), t = t_d_, u = u_d_;
      const Tile<T> d_scaled = of_dim(d_scaled_, g);
      multiply<kSet>(t_d_, d.left(), s_.hidden, of_hidden(f_, g).half(0));
      each(s_.dim, width_, [=](int64_t i, int64_t j) {
        d_scaled[i][j] = -end[j] * t[i][j];
        d_end[j] -= scaled[i][j] * t[i][j];
        u[i][j] = -scaled[i][j] * end[j];
      });
      multiply<kAdd>(of_hidden(d_f_, g).half(0), d.transposed(), s_.dim, u_d_);
    }
    // W2 keep + W2_0 pull - slope r
    const int64_t rows = 4 * s_.hidden;
    const Tile<T> d = w2(d_running_, 0, 4), d_slope = of_hidden(d_slope_, 0, 4);
    transpose(dd_t_, keep_);
    multiply<kSet>(w2(d_before_, 0, 4), d.left(), s_.dim, dd_t_);
    transpose(dd_t_, pull_);
    multiply<kAdd>(w2(d_initial_, 0, 4), d.left(), s_.dim, dd_t_);
    transpose_tokens(r_t_, r_);
    zero(d_slope);
    multiply<kSubtract>(d_slope, d.left(), s_.dim, r_t_);
    multiply<kSet>(d_keep_, w2(running_, 0, 4).transposed(), rows, d);
    multiply<kSet>(d_pull_, w2(initial_, 0, 4).transposed(), rows, d);
    const Tile<T> d_r = d_r_.part(0, count_), d_z = d_z_.part(0, count_);
    zero(d_r);
    multiply<kSubtract>(d_r, of_hidden(slope_, 0, 4).transposed(), rows, d);
    multiply<kSubtract>(d_r, ka_.transposed(), s_.dim, d_keep_);
    multiply<kSubtract>(d_r, kb_.transposed(), s_.dim, d_pull_);
    for (int64_t i = 0; i < s_.dim; ++i) {
      d_rate_.all_kept += d_keep_[i][i], d_rate_.all_pulled += d_pull_[i][i];
    }
    const Tile<T> t = t_d_, u = u_d_, key = kv_.half(0), d_key = d_kv_.half(0);
    const T *eta = rate_.eta, *kept = rate_.kept, *pulled = rate_.pulled;
    T *d_eta = d_rate_.eta, *d_kept = d_rate_.kept, *d_pulled = d_rate_.pulled;
    multiply<kSet>(t, d_keep_.left(), s_.dim, r_t_);
    multiply<kSet>(u, d_pull_.left(), s_.dim, r_t_);
    each(s_.dim, width_, [=](int64_t i, int64_t j) {
      const T a = -t[i][j], b = -u[i][j], both = a * kept[j] + b * pulled[j];
      d_key[i][j] += eta[j] * both;
      d_eta[j] += key[i][j] * both;
      d_kept[j] += eta[j] * key[i][j] * a;
      d_pulled[j] += eta[j] * key[i][j] * b;
    });
    // r = inverse z, z = diag(end) key^T
    multiply<kSet>(d_z, eta_inverse_.transposed(), count_, d_r);
    multiply<kSet>(square_.part(0, count_), d_z.left(), s_.dim, r_t_);
    system_back(square_, v_, rate_.eta, d_rate_.eta);
    multiply<kAdd>(d_kv_.half(0), kv_.half(0).left(), count_, square_);
    transpose_tokens(t_d_, d_z_);
    each(s_.dim, width_, [=](int64_t i, int64_t j) {
      d_key[i][j] += end[j] * t[i][j];
      d_end[j] += key[i][j] * t[i][j];
    });
  }

  // Tokens in rows to tokens in columns, with zeros beyond the tokens.
  void transpose_tokens(Tile<T> to, Tile<T> from) {
    if (count_ < width_) zero(to);
    transpose(to, from.part(0, count_));
  }

  // The gradient of h in f = n activation(h), where n may have a gradient d_n of its own.
  void features_back(Tile<T> to, Tile<T> d, Tile<T> f, Tile<T> slope, const T* n, const T* d_n) {
    T* sum = sum2_;
    each(d.columns, [=](int64_t j) { sum[j] = d_n ? d_n[j] * n[j] : T(0); });
    each(d.rows, d.columns, [=](int64_t i, int64_t j) { sum[j] += f[i][j] * d[i][j]; });
    each(d.rows, d.columns, [=](int64_t i, int64_t j) {
      to[i][j] = slope[i][j] * n[j] * (d[i][j] - f[i][j] * sum[j]);
    });
  }

  // The gradient of x in y = n x, a unit column.
  void unit_back(Tile<T> to, Tile<T> d, Tile<T> y, const T* n) {
    T* sum = sum2_;
    each(width_, [=](int64_t j) { sum[j] = 0; });
    each(d.rows, width_, [=](int64_t i, int64_t j) { sum[j] += y[i][j] * d[i][j]; });
    each(d.rows, width_, [=](int64_t i, int64_t j) {
      to[i][j] = n[j] * (d[i][j] - y[i][j] * sum[j]);
    });
  }

  void surprise_back(int m) {
    const Tile<T> f = of_hidden(f_, m).half(0), d_f = of_hidden(d_f_, m).half(0);
    const Tile<T> s = of_hidden(slopes_, m).half(0), bend = of_hidden(bend_, m), p = of_hidden(p_, m);
    const Tile<T> d_slope = of_hidden(d_slope_, m), d_p = t_h(m), direct = u_h(m);
    const Tile<T> feature_t = f_t(m);
    const T *n = n_[m], *fp = fp_[m], *eta = rate_.eta;
    T *d_n = sum_, *fy = sum2_, *d_eta = d_rate_.eta;
    each(width_, [=](int64_t j) { d_n[j] = fy[j] = 0; });
    each(f.rows, width_, [=](int64_t i, int64_t j) {
      const T t = s[i][j] * d_slope[i][j];
      d_n[j] += t * (p[i][j] - f[i][j] * fp[j]);
      fy[j] += f[i][j] * n[j] * t;
    });
    each(f.rows, width_, [=](int64_t i, int64_t j) {
      const T d_y = n[j] * s[i][j] * d_slope[i][j];
      direct[i][j] = bend[i][j] * n[j] * (p[i][j] - f[i][j] * fp[j]) * d_slope[i][j];
      d_p[i][j] = d_y - f[i][j] * fy[j];
      d_f[i][j] -= d_y * fp[j] + p[i][j] * fy[j];
    });
    const Tile<T> scaled = of_dim(scaled_, m), d_scaled = of_dim(d_scaled_, m);
    const Tile<T> error = of_dim(error_, m), hat = of_dim(hat_, m);
    const Tile<T> d_read = of_dim(d_read_, m), d_found = d_read.half(0), d_refined = d_read.half(1);
    transpose(feature_t.part(0, width_), d_p);
    multiply<kAdd>(w1(d_anchor_, m), scaled.left(), count_, feature_t);
    multiply<kAdd>(d_scaled, w1(anchor_, m).left(), f.rows, d_p);
    const Tile<T> d_key = d_kv_.half(0), d_value = d_kv_.half(1), d_hat = t_d_;
    each(s_.dim, width_, [=](int64_t i, int64_t j) {
      const T d_error = eta[j] * d_scaled[i][j];
      d_eta[j] += d_scaled[i][j] * error[i][j];
      d_key[i][j] += d_error;
      d_found[i][j] = d_error;
      d_hat[i][j] = -d_error;
    });
    unit_back(d_refined, d_hat, hat, hat_n_[m]);
    each(s_.dim, width_, [=](int64_t i, int64_t j) { d_value[i][j] += d_refined[i][j]; });
    const Tile<T> both = of_hidden(f_, m), d_both = of_hidden(d_f_, m);
    transpose(feature_t, both);
    multiply<kAdd>(w1(d_anchor_, m), d_read.left(), 2 * width_, feature_t);
    multiply<kAdd>(d_both, w1(anchor_, m).transposed(), s_.dim, d_read);
    features_back(d_f, d_f, f, s, n, d_n);
    features_back(d_both.half(1), d_both.half(1), both.half(1), of_hidden(slopes_, m).half(1),
                  n + width_, nullptr);
    each(f.rows, width_, [=](int64_t i, int64_t j) { d_f[i][j] += direct[i][j]; });
    multiply<kAdd>(w2(d_anchor_, m), d_both.left(), 2 * width_, kv_t_);
    multiply<kAdd>(d_kv_, w2(anchor_, m).transposed(), f.rows, d_both);
  }

  void generate_back() {
    rates_back();
    unit_back(of_dim(d_made_, 0), d_kv_.half(0), kv_.half(0), key_n_);
    unit_back(of_dim(d_made_, 1), d_kv_.half(1), kv_.half(1), value_n_);
    const Tile<T> d = d_made_, d_x_key = d_x_key_, d_key = of_dim(d, 0), d_eta = of_dim(d, 2),
                  d_alpha = of_dim(d, 3);
    each(s_.dim, width_, [=](int64_t i, int64_t j) {
      d_x_key[i][j] = d_key[i][j] + d_eta[i][j] + d_alpha[i][j];
    });
    copy(d_x_value_, of_dim(d, 1));
    for (int g = 0; g < 4; ++g) {
      const Tile<T> f = of_hidden(gen_f_, g), slope = of_hidden(gen_s_, g);
      transpose(gen_f_t_.part(0, width_), f);
      multiply<kAdd>(w1(d_anchor_, g), of_dim(d, g).left(), count_, gen_f_t_);
      multiply<kSet>(t_h(g), w1(anchor_, g).transposed(), s_.dim, of_dim(d, g));
      features_back(slope, t_h(g), f, slope, gen_n_[g], nullptr);
    }
    const auto through = [&](int g, int count, Tile<T> x, Tile<T> d_x) {
      const Tile<T> d_h = of_hidden(gen_s_, g, count);
      transpose(input_t_, x);
      multiply<kAdd>(w2(d_anchor_, g, count), d_h.left(), count_, input_t_);
      multiply<kAdd>(d_x, w2(anchor_, g, count).transposed(), count * s_.hidden, d_h);
    };
    through(0, 1, x_key_, d_x_key_), through(2, 2, x_key_, d_x_key_);
    through(1, 1, x_value_, d_x_value_);
  }

  void spread(Tile<T> to, const T* d) {
    const T by = T(1) / root(T(to.rows));
    each(to.rows, width_, [=](int64_t i, int64_t j) { to[i][j] = by * d[j]; });
  }

  // From the gradients of the rates to those of the gates and of the generated channels. From here on
  // d_rate_.kept is the gradient of the retention's logit.
  void rates_back() {
    T* log_b = d_rate_.log_b;
    const int64_t c = count_;
    for (int64_t j = 0; j < c; ++j) {
      log_b[j] += rate_.kept[j] * (d_rate_.kept[j] - d_rate_.pulled[j]);
      const T end = rate_.end[j] * d_rate_.end[j];
      log_b[c] += end, log_b[j + 1] -= end;
    }
    log_b[c] += rate_.all_kept * (d_rate_.all_kept - d_rate_.all_pulled);
    const T erase_share = sigmoid(gates_[kEraseRange]), delta_share = sigmoid(gates_[kDeltaRange]);
    T later = 0, d_gates[6] = {};
    T *eta = d_rate_.eta, *erase = d_rate_.erase, *delta = d_rate_.delta, *keep = d_rate_.kept;
    std::fill(keep + c, keep + width_, T(0));
    for (int64_t j = c; j-- > 0;) {
      later += log_b[j + 1];
      const T kept = sig_keep_[j], half = (T(1) + kept) / 2;
      T d_half = form_.max_eta * sig_eta_[j] * eta[j];
      eta[j] *= rate_.eta[j] * (T(1) - sig_eta_[j]);
      d_gates[kEta] += eta[j];
      const auto share_back = [&](T& d, T most, T share, T sig, int bias, int range) {
        const T part = T(1.1) * share * sig;
        d_half += most * at_most_1(part) * d;
        d = part > 1 ? T(0) : most * half * part * d;
        d_gates[range] += d * (T(1) - share);
        d *= T(1) - sig;
        d_gates[bias] += d;
      };
      share_back(erase[j], form_.max_erase, erase_share, sig_erase_[j], kErase, kEraseRange);
      share_back(delta[j], form_.max_delta, delta_share, sig_delta_[j], kDelta, kDeltaRange);
      keep[j] = d_half * kept * (T(1) - kept) / 2 + later * (T(1) - kept);
      d_gates[kAlpha] += keep[j];
    }
    for (int i = 0; i < 6; ++i) d_gates_[i] += d_gates[i];
    for (T* each : {eta, erase, delta}) std::fill(each + c, each + width_, T(0));
    const Tile<T> alpha = of_dim(d_made_, 3);
    spread(of_dim(d_made_, 2), eta);
    spread(alpha.part(0, kept_channels()), keep);
    const T sharpness = form_.sharpness;
    each(width_, [=](int64_t j) { erase[j] *= sharpness, delta[j] *= sharpness; });
    spread(alpha.part(kept_channels(), third()), erase);
    spread(alpha.part(kept_channels() + third(), third()), delta);
  }
