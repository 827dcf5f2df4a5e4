// M3's momenta, entry by entry (Alg. 1, Eq 75, in the form of deepopt/memory/multi_scale.py). f is
// the number of steps in a chunk, t the step that is taken, k the number of chunks that ended
// before it.
//
//   b3 = min(beta3, k / (k + 4))
//   M1 <- M1 + (1 - b1) (g - M1),   look-ahead = b1 M1 + (1 - b1) g
//   M2 <- (b3 if a chunk begins, else 1) M2 + (1 - b3) / f g
#pragma once
#include "rule.h"

namespace deepopt {

// The arrays hold the B matrices of a stack one after the other.
struct MultiScale {
  double retention, beta3;
  int64_t slow_chunk;
  int64_t batch, entries;  // of a matrix
  const float *momentum, *slow, *grad;
  const float* step;  // of each matrix
  float *new_momentum, *new_slow, *ahead;

  struct Factors {  // of a matrix
    float retention, fresh, decay, share;
  };

  DEEPOPT_RULE Factors factors(int64_t b) const {
    constexpr double kWindowDivisor = 4;  // WINDOW_DIVISOR in deepopt/ops/multi_scale_write.py
    const double before = double(step[b]) - 1, ended = floor(before / double(slow_chunk));
    const double limit = ended / (ended + kWindowDivisor), kept = limit < beta3 ? limit : beta3;
    const bool begins = before == ended * double(slow_chunk);
    return {float(retention), float(1 - retention), begins ? float(kept) : 1,
            float((1 - kept) / double(slow_chunk))};
  }

  // Writes the gradient into both momenta, and replaces it by the fast one's look-ahead.
  static DEEPOPT_RULE void take_in(const Factors& f, float& momentum, float& slow, float& grad) {
    momentum = lerp(momentum, grad, f.fresh);
    slow = fma_(f.decay, slow, f.share * grad);
    grad = lerp(grad, momentum, f.retention);
  }
};

}  // namespace deepopt
