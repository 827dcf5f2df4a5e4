// deepopt::block_token: one token of every sequence through one block of Hope, on the CPU.
//
// A decoded token is a few products of matrices with vectors, which take less time than the calls
// of the operators that they consist of. Here they are one call.
#include "../common/boxed.h"
#include "../common/multi_tensor.h"
#include "levels.h"
#include "operators.h"

#include <cmath>
#include <cstring>
#include <optional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deepopt::block_token {

struct Sizes {
  int64_t batch, dim, heads, d;
  int64_t hidden, memory_hidden;  // of the memories that generate, and of the one that answers
  int64_t width;                  // of the convolutions
  int64_t turning;                // heads whose queries turn
  int64_t widest;                 // hidden width of the widest level
};

struct Form {
  double max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness, eps;
};

template <class T>
struct Level {
  const T *norm, *up, *down;
  int64_t hidden;
};

// The arguments of the operator, in groups. `weights` and `initial` have the memories that
// generate, then the one that answers: w2, w1 and, in `weights`, the anchors of both. `convolutions`
// and `tails` are those of keys, values and queries.
template <class T>
struct Given {
  const T *x, *norm, *key, *value, *query, *gate, *output, *turns, *head_norm, *gates, *phase;
  const T *convolutions[3], *tails[3];
  const T *weights[2][4], *initial[2][2];
  std::vector<Level<T>> levels;
};

template <class T>
struct Made {
  T *y, *weights[2][2], *tails[3], *phase;
};

#define DEEPOPT_LEVEL_FILE "block_token_level.h"
#include "every_level.h"

namespace {

template <class T>
void run(const Sizes& sizes, const Form& form, const Given<T>& given, const Made<T>& made) {
#if defined(DEEPOPT_LEVELS)
  static const int found = processor_level();
  if (found == 4) return v4::run(sizes, form, given, made);
  if (found == 3) return v3::run(sizes, form, given, made);
#endif
  base::run(sizes, form, given, made);
}

struct DEEPOPT_HIDDEN Arguments {
  Tensor x, norm, key, value, query, gate, output;
  std::optional<Tensor> turns;
  Tensor head_norm, gates;
  std::vector<Tensor> convolutions, level_norms, ups, downs, initial, weights, tails;
  Tensor phase;
  double max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness, eps;

  void take_from(BoxedCall& call) {
    call.take(x, norm, key, value, query, gate, output, turns, head_norm, gates, convolutions,
              level_norms, ups, downs, initial, weights, tails, phase, max_eta, max_erase, max_delta,
              generator_floor, memory_floor, sharpness, eps);
  }
  Form form() const {
    return {max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness, eps};
  }

  // The sizes, for which all tensors are checked and made contiguous.
  Sizes check() {
    STD_TORCH_CHECK(convolutions.size() == 3 && tails.size() == 3 && weights.size() == 8 &&
                        (initial.empty() || initial.size() == 4) && level_norms.size() == ups.size() &&
                        ups.size() == downs.size(),
                    "deepopt::block_token: three convolutions and tails, eight tensors of weights "
                    "and none or four of initial ones, three for every level");
    STD_TORCH_CHECK(x.dim() == 2 && gates.dim() == 2 && weights[0].dim() == 5 &&
                        weights[4].dim() == 5 && tails[0].dim() == 3 && phase.dim() == 2,
                    "deepopt::block_token: a tensor has another number of dimensions than the "
                    "operator's documentation says");
    Sizes s{x.size(0), x.size(1), gates.size(0), weights[0].size(4), weights[0].size(3),
            weights[4].size(3), tails[0].size(2) + 1, phase.size(1), 0};
    STD_TORCH_CHECK(s.heads >= 1 && s.d >= 3 && s.hidden >= 1 && s.memory_hidden >= 1 &&
                        s.heads * s.d == s.dim && s.turning <= s.heads &&
                        turns.has_value() == (s.turning > 0),
                    "deepopt::block_token: heads of at least 3 channels, memories with a hidden "
                    "width, and a matrix of turns if and only if there are phases");
    const int64_t b = s.batch, h = s.heads, d = s.d, n = s.hidden, m = s.memory_hidden;
    fit(x, {b, s.dim}), fit(norm, {s.dim}), fit(head_norm, {d}), fit(gates, {h, 6});
    for (Tensor* each : {&key, &value, &query, &gate, &output}) fit(*each, {s.dim, s.dim});
    if (turns) fit(*turns, {2 * s.turning, s.dim});
    for (Tensor& each : convolutions) fit(each, {s.dim, 1, s.width});
    for (Tensor& each : tails) fit(each, {b, s.dim, s.width - 1});
    for (int i = 0; i < 8; ++i) {
      const int64_t count = i < 4 ? 4 : 1, rows = i < 4 ? n : m;
      if (i % 2 == 0) fit(weights[i], {b, h, count, rows, d});
      if (i % 2 == 1) fit(weights[i], {b, h, count, d, rows});
    }
    for (size_t i = 0; i < initial.size(); ++i) {
      const int64_t count = i < 2 ? 4 : 1, rows = i < 2 ? n : m;
      if (i % 2 == 0) fit(initial[i], {h, count, rows, d});
      if (i % 2 == 1) fit(initial[i], {h, count, d, rows});
    }
    for (size_t i = 0; i < ups.size(); ++i) {
      STD_TORCH_CHECK(ups[i].dim() == 2, "deepopt::block_token: ups are matrices");
      const int64_t wide = ups[i].size(0);
      fit(level_norms[i], {s.dim}), fit(ups[i], {wide, s.dim}), fit(downs[i], {s.dim, wide});
      s.widest = std::max(s.widest, wide);
    }
    fit(phase, {b, s.turning});
    return s;
  }
  void fit(Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    check_and_pack(tensor, x, sizes, "block_token");
  }
};

template <class T>
std::vector<Tensor> result(const Arguments& x, const Sizes& s) {
  const auto at = [](const Tensor& tensor) { return tensor.const_data_ptr<T>(); };
  Given<T> given{at(x.x), at(x.norm), at(x.key), at(x.value), at(x.query), at(x.gate),
                 at(x.output), x.turns ? at(*x.turns) : nullptr, at(x.head_norm), at(x.gates),
                 at(x.phase), {}, {}, {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    given.convolutions[i] = at(x.convolutions[i]), given.tails[i] = at(x.tails[i]);
  }
  for (int i = 0; i < 8; ++i) given.weights[i / 4][i % 4] = at(x.weights[i]);
  for (size_t i = 0; i < x.initial.size(); ++i) given.initial[i / 2][i % 2] = at(x.initial[i]);
  for (size_t i = 0; i < x.ups.size(); ++i) {
    given.levels.push_back({at(x.level_norms[i]), at(x.ups[i]), at(x.downs[i]), x.ups[i].size(0)});
  }
  std::vector<Tensor> made;
  for (const Tensor* each : {&x.x, &x.weights[0], &x.weights[1], &x.weights[4], &x.weights[5],
                             &x.tails[0], &x.tails[1], &x.tails[2], &x.phase}) {
    made.push_back(torch::stable::empty_like(*each));
  }
  const auto to = [&](int i) { return made[i].mutable_data_ptr<T>(); };
  if (s.batch == 0) return made;
  run<T>(s, x.form(), given,
         {to(0), {{to(1), to(2)}, {to(3), to(4)}}, {to(5), to(6), to(7)}, to(8)});
  return made;
}

std::vector<Tensor> block_token(Arguments x) {
  const Sizes s = x.check();
  if (x.x.scalar_type() == ScalarType::Double) return result<double>(x, s);
  STD_TORCH_CHECK(x.x.scalar_type() == ScalarType::Float, "deepopt::block_token: float32 or float64");
  return result<float>(x, s);
}

}  // namespace
}  // namespace deepopt::block_token

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  using deepopt::block_token::Arguments;
  m.impl("block_token", &deepopt::boxed<&deepopt::block_token::block_token, Arguments>);
}
