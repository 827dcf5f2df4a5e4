// What M3 does to an entry of its momenta (Alg. 1 as settled): the fast one takes the gradient in at
// every step, the slow one a share of it, and forgets where a chunk begins.
#pragma once
#include "rule.h"

namespace deepopt {

// With torch's bits, so that the fast momentum is the linear memory's.
DEEPOPT_RULE float lerp(float from, float to, float weight) {
  const bool near = fabsf(weight) < 0.5f;
  return fma_(near ? weight : weight - 1, to - from, near ? from : to);
}

struct MultiScale {
  double retention, beta3;
  int64_t slow_chunk;

  struct Factors {  // of a matrix
    float retention, fresh, decay, share;
  };
  // At the step that is taken, the first being 1.
  DEEPOPT_RULE Factors factors(float step) const {
    constexpr double kFarthest = 4;  // FARTHEST in deepopt/ops/multi_scale_write.py
    const double before = double(step) - 1, ended = floor(before / double(slow_chunk));
    const double limit = ended / (ended + kFarthest), kept = limit < beta3 ? limit : beta3;
    const bool begins = before == ended * double(slow_chunk);
    return {float(retention), float(1 - retention), begins ? float(kept) : 1,
            float((1 - kept) / double(slow_chunk))};
  }

  // Both momenta take the gradient in, in whose place the fast one's look-ahead comes.
  static DEEPOPT_RULE void next(const Factors& f, float& momentum, float& slow, float& grad) {
    momentum = lerp(momentum, grad, f.fresh);
    slow = fma_(f.decay, slow, f.share * grad);
    grad = lerp(grad, momentum, f.retention);
  }
};

}  // namespace deepopt
