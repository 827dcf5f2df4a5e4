// deepopt::memories and deepopt::memories_gradient: Hope's self-modifying memories on the CPU.
//
// The heads of all sequences are divided among the threads. A thread takes a head from chunk to chunk,
// with all tiles of a chunk in the second-level cache. The backward pass starts from the stored state
// at the start of each chunk, and computes the rest of the chunk once more.
#include "../common/boxed.h"
#include "../common/multi_tensor.h"
#include "levels.h"
#include "operators.h"

#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deepopt::memories {

// A stretch of tokens up to the next end of a chunk, or up to the last token.
struct Segment {
  int64_t begin, length;
  bool anchors_generators, anchors_memory;  // whether a chunk begins with it
  int64_t generators_anchor, memory_anchor;  // the segment that the anchor was set in, or -1
};

struct Shape {
  int64_t batch, heads, dim;
  int64_t hidden, memory_hidden;  // of the memories that generate, and of the one that answers
  int64_t tokens;
  std::vector<Segment> segment;
  int64_t segments, longest;

  int64_t rows() const { return 4 * hidden + memory_hidden; }  // of all W2
  int64_t state() const { return 2 * dim * rows(); }  // numbers of the weights of five memories
  int64_t generators() const { return 4 * dim * hidden; }  // numbers of their W2, and of their W1
  int64_t memory() const { return dim * memory_hidden; }
};

struct Form {
  double max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness;
};

// What the operators are given for one head of one sequence.
template <class T>
struct Given {
  const T *key, *value, *query, *w2, *w1, *anchor_w2, *anchor_w1;
  const T *memory_w2, *memory_w1, *memory_anchor_w2, *memory_anchor_w1;
  const T *initial_w2, *initial_w1, *memory_initial_w2, *memory_initial_w1, *gates;
};

// The outputs and the two states after the last token, or their gradients.
template <class T>
struct Ends {
  T *out, *w2, *w1, *anchor_w2, *anchor_w1;
  T *memory_w2, *memory_w1, *memory_anchor_w2, *memory_anchor_w1;
};

template <class T>
struct Gradients {
  T *key, *value, *query, *w2, *w1, *anchor_w2, *anchor_w1;
  T *memory_w2, *memory_w1, *memory_anchor_w2, *memory_anchor_w1;
  T *initial, *gates;
};

#define DEEPOPT_LEVEL_FILE "memories_level.h"
#include "every_level.h"

namespace {

// Calls f(head) once; `head` holds tiles, and is compiled for the level of this processor.
template <class T, class F>
void with_tiles(const Shape& shape, const Form& form, bool backward, const F& f) {
  const auto run = [&](auto* kind) {
    using Head = std::remove_pointer_t<decltype(kind)>;
    struct alignas(64) Line {
      char at[64];
    };
    const int64_t bytes = Head::size(shape, form, backward) * int64_t(sizeof(T));
    std::vector<Line> memory((bytes + 63) / 64);
    Head head(shape, form, backward, reinterpret_cast<T*>(memory.data()));
    f(head);
  };
#if defined(DEEPOPT_LEVELS)
  static const int found = processor_level();
  if (found == 4) return run(static_cast<v4::Head<T>*>(nullptr));
  if (found == 3) return run(static_cast<v3::Head<T>*>(nullptr));
#endif
  run(static_cast<base::Head<T>*>(nullptr));
}

// The segments of tokens that begin at `position` of their texts.
Shape shape_of(const Tensor& key, const Tensor& w2, const Tensor& memory_w2, int64_t generators,
               int64_t memory, int64_t position) {
  Shape shape{key.size(0), key.size(1), key.size(2), w2.size(3), memory_w2.size(3), key.size(3),
              {},          0,           0};
  int64_t generators_anchor = -1, memory_anchor = -1;
  for (int64_t begin = 0; begin < shape.tokens;) {
    const int64_t at = position + begin;
    const int64_t length = std::min({generators - at % generators, memory - at % memory,
                                     shape.tokens - begin});
    const bool first = at % generators == 0, second = at % memory == 0;
    if (first) generators_anchor = shape.segments;
    if (second) memory_anchor = shape.segments;
    shape.segment.push_back({begin, length, first, second, generators_anchor, memory_anchor});
    shape.longest = std::max(shape.longest, length);
    begin += length, ++shape.segments;
  }
  return shape;
}

struct DEEPOPT_HIDDEN Arguments {
  Tensor key, value, query, w2, w1, anchor_w2, anchor_w1;
  Tensor memory_w2, memory_w1, memory_anchor_w2, memory_anchor_w1;
  std::optional<Tensor> initial_w2, initial_w1, memory_initial_w2, memory_initial_w1;
  Tensor gates;
  double max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness;
  int64_t projection_chunk, memory_chunk, position;

  void take_from(BoxedCall& call) {
    call.take(key, value, query, w2, w1, anchor_w2, anchor_w1, memory_w2, memory_w1,
              memory_anchor_w2, memory_anchor_w1, initial_w2, initial_w1, memory_initial_w2,
              memory_initial_w1, gates, max_eta, max_erase, max_delta, generator_floor, memory_floor,
              sharpness, projection_chunk, memory_chunk, position);
  }
  Shape shape() const {
    return shape_of(key, w2, memory_w2, projection_chunk, memory_chunk, position);
  }
  Form form() const {
    return {max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness};
  }

  // Checks all tensors, and makes their rows lie one after the other.
  void check(const Shape& s) {
    const int64_t b = s.batch, h = s.heads, d = s.dim, t = s.tokens;
    const int64_t n = s.hidden, m = s.memory_hidden;
    STD_TORCH_CHECK(d >= 3 && n >= 1 && m >= 1 && t >= 1 && projection_chunk >= 1 && memory_chunk >= 1,
                    "deepopt::memories: heads need 3 channels, memories a hidden width, and there "
                    "must be a token");
    for (Tensor* each : {&key, &value, &query}) fit(*each, {b, h, d, t});
    for (Tensor* each : {&w2, &anchor_w2}) fit(*each, {b, h, 4, n, d});
    for (Tensor* each : {&w1, &anchor_w1}) fit(*each, {b, h, 4, d, n});
    for (Tensor* each : {&memory_w2, &memory_anchor_w2}) fit(*each, {b, h, 1, m, d});
    for (Tensor* each : {&memory_w1, &memory_anchor_w1}) fit(*each, {b, h, 1, d, m});
    const bool pulled = bool(initial_w2);
    STD_TORCH_CHECK(bool(initial_w1) == pulled && bool(memory_initial_w2) == pulled &&
                        bool(memory_initial_w1) == pulled,
                    "deepopt::memories: initial weights are all there or none is");
    if (pulled) {
      fit(*initial_w2, {h, 4, n, d});
      fit(*initial_w1, {h, 4, d, n});
      fit(*memory_initial_w2, {h, 1, m, d});
      fit(*memory_initial_w1, {h, 1, d, m});
    }
    fit(gates, {h, 6});
  }
  void fit(Tensor& tensor, std::initializer_list<int64_t> sizes) const {
    check_and_pack(tensor, key, sizes, "memories");
  }

  template <class T>
  Given<T> given(const Shape& s, int64_t pair) const {
    const int64_t tokens = s.dim * s.tokens, four = s.generators(), one = s.memory();
    const int64_t head = pair % s.heads;
    const auto at = [](const Tensor& x, int64_t offset) { return x.const_data_ptr<T>() + offset; };
    const auto of_head = [&](const std::optional<Tensor>& x, int64_t count) {
      return x ? at(*x, head * count) : nullptr;
    };
    return {at(key, pair * tokens),
            at(value, pair * tokens),
            at(query, pair * tokens),
            at(w2, pair * four),
            at(w1, pair * four),
            at(anchor_w2, pair * four),
            at(anchor_w1, pair * four),
            at(memory_w2, pair * one),
            at(memory_w1, pair * one),
            at(memory_anchor_w2, pair * one),
            at(memory_anchor_w1, pair * one),
            of_head(initial_w2, four),
            of_head(initial_w1, four),
            of_head(memory_initial_w2, one),
            of_head(memory_initial_w1, one),
            at(gates, head * 6)};
  }
};

// Calls f(head, pair) for every head of every sequence; `head` holds the tiles of the thread.
template <class T, class F>
void for_heads(const Shape& shape, const Form& form, bool backward, const F& f) {
  torch::stable::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t first, int64_t last) {
    with_tiles<T>(shape, form, backward, [&](auto& head) {
      for (int64_t pair = first; pair < last; ++pair) f(head, pair);
    });
  });
}

template <class T, class Tensors>
Ends<T> ends_of(const Tensors& x, const Shape& s, int64_t pair) {
  const int64_t four = s.generators(), one = s.memory();
  const int64_t each[9] = {s.dim * s.tokens, four, four, four, four, one, one, one, one};
  T* at[9];
  for (int i = 0; i < 9; ++i) at[i] = x[i] ? x[i] + pair * each[i] : nullptr;
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8]};
}

template <class T>
std::vector<Tensor> forward(const Arguments& x, const Shape& s, bool keep) {
  std::vector<Tensor> made{torch::stable::empty_like(x.key)};
  for (const Tensor* each : {&x.w2, &x.w1, &x.anchor_w2, &x.anchor_w1, &x.memory_w2, &x.memory_w1,
                             &x.memory_anchor_w2, &x.memory_anchor_w1}) {
    made.push_back(torch::stable::empty_like(*each));
  }
  const int64_t count = keep ? s.segments : 0;
  made.push_back(torch::stable::empty({s.batch, s.heads, count * s.state()}, x.key.scalar_type()));
  std::vector<T*> to;
  for (const Tensor& each : made) to.push_back(each.mutable_data_ptr<T>());
  for_heads<T>(s, x.form(), false, [&](auto& head, int64_t pair) {
    T* starts = keep ? to[9] + pair * count * s.state() : nullptr;
    head.run(x.given<T>(s, pair), ends_of<T>(to, s, pair), starts);
  });
  return made;
}

template <class T>
std::vector<Tensor> backward(const std::vector<std::optional<Tensor>>& grads, const Arguments& x,
                             const Shape& s, const Tensor& starts) {
  std::vector<Tensor> made;
  for (const Tensor* each : {&x.key, &x.value, &x.query, &x.w2, &x.w1, &x.anchor_w2, &x.anchor_w1,
                             &x.memory_w2, &x.memory_w1, &x.memory_anchor_w2,
                             &x.memory_anchor_w1}) {
    made.push_back(torch::stable::empty_like(*each));
  }
  const auto type = x.key.scalar_type();
  made.push_back(torch::stable::empty({s.heads, 4, s.hidden, s.dim}, type));
  made.push_back(torch::stable::empty({s.heads, 4, s.dim, s.hidden}, type));
  made.push_back(torch::stable::empty({s.heads, 1, s.memory_hidden, s.dim}, type));
  made.push_back(torch::stable::empty({s.heads, 1, s.dim, s.memory_hidden}, type));
  made.push_back(torch::stable::empty({s.heads, 6}, type));
  std::vector<const T*> from;
  for (const auto& each : grads) from.push_back(each ? each->const_data_ptr<T>() : nullptr);
  std::vector<T*> to;
  for (const Tensor& each : made) to.push_back(each.mutable_data_ptr<T>());
  const T* kept = starts.const_data_ptr<T>();
  const int64_t tokens = s.dim * s.tokens, four = s.generators(), one = s.memory();
  // All sequences share the initial weights and the gates. Each head of each sequence writes its
  // gradients into a part of its own, and the parts are added in one fixed order.
  const int64_t shared = s.state() + 6;
  std::vector<T> parts(s.batch * s.heads * shared);
  for_heads<T>(s, x.form(), true, [&](auto& head, int64_t i) {
    T* part = parts.data() + i * shared;
    const Gradients<T> at{to[0] + i * tokens, to[1] + i * tokens, to[2] + i * tokens,
                          to[3] + i * four,   to[4] + i * four,   to[5] + i * four,
                          to[6] + i * four,   to[7] + i * one,    to[8] + i * one,
                          to[9] + i * one,    to[10] + i * one,   part,
                          part + s.state()};
    head.run_back(x.given<T>(s, i), ends_of<const T>(from, s, i), kept + i * s.segments * s.state(),
                  at);
  });
  // A part holds all W2, then all W1, then the gates.
  const std::pair<int, int64_t> shares[] = {
      {11, s.generators()}, {13, s.memory()}, {12, s.generators()}, {14, s.memory()}, {15, 6}};
  for (int64_t head = 0; head < s.heads; ++head) {
    int64_t offset = head * shared;
    for (const auto& [which, size] : shares) {
      T* sum = to[which] + head * size;
      std::fill_n(sum, size, T(0));
      for (int64_t b = 0; b < s.batch; ++b) {
        const T* part = parts.data() + b * s.heads * shared + offset;
        for (int64_t j = 0; j < size; ++j) sum[j] += part[j];
      }
      offset += size;
    }
  }
  return made;
}

std::vector<Tensor> run(bool keep, Arguments x) {
  const Shape s = x.shape();
  x.check(s);
  if (x.key.scalar_type() == ScalarType::Double) return forward<double>(x, s, keep);
  STD_TORCH_CHECK(x.key.scalar_type() == ScalarType::Float, "deepopt::memories: float32 or float64");
  return forward<float>(x, s, keep);
}

std::vector<Tensor> run_gradient(std::vector<Tensor> grads, Tensor starts, Arguments x) {
  const Shape s = x.shape();
  x.check(s);
  std::vector<std::optional<Tensor>> given;
  STD_TORCH_CHECK(grads.size() == 9, "deepopt::memories_gradient: nine gradients");
  for (const Tensor& each : grads) {
    if (each.numel() == 0) {
      given.emplace_back();
    } else {
      given.emplace_back(torch::stable::contiguous(each));
    }
  }
  starts = torch::stable::contiguous(starts);
  STD_TORCH_CHECK(starts.numel() == s.batch * s.heads * s.segments * s.state(),
                  "deepopt::memories_gradient: starts must be those that memories returned");
  if (x.key.scalar_type() == ScalarType::Double) return backward<double>(given, x, s, starts);
  STD_TORCH_CHECK(x.key.scalar_type() == ScalarType::Float, "deepopt::memories: float32 or float64");
  return backward<float>(given, x, s, starts);
}

}  // namespace
}  // namespace deepopt::memories

STABLE_TORCH_LIBRARY_IMPL(deepopt, CPU, m) {
  using deepopt::memories::Arguments;
  m.impl("memories", &deepopt::boxed<&deepopt::memories::run, bool, Arguments>);
  m.impl("memories_gradient",
         &deepopt::boxed<&deepopt::memories::run_gradient, std::vector<deepopt::Tensor>,
                         deepopt::Tensor, Arguments>);
}
