// The memory of several horizons: K averages, mixed by an MLP that sees how well each of them
// predicts the gradient (deepopt/memory/horizons.py has the equations).
#pragma once
#include "sums.h"

namespace deepopt {

// The arrays hold the B matrices of a stack one after the other.
struct Horizons {
  static constexpr int kMostScales = 8;  // MOST_SCALES in deepopt/ops/horizons_write.py

  int scales, units;       // averages, and hidden units of the MLP
  int64_t batch, entries;  // of a matrix
  double retentions[kMostScales];
  const float* averages[kMostScales];
  const float* grad;
  const float *foresight, *grad_size, *phi, *step;  // B x scales, B, B x units x (3 scales + 2), B
  float* new_averages[kMostScales];
  float *new_foresight, *new_grad_size, *weights;  // the last is B x (scales - 1)
  float* read;

  DEEPOPT_RULE float retention(int k) const { return float(retentions[k]); }
  DEEPOPT_RULE float fresh(int k) const { return float(1 - retentions[k]); }

  // Sums over the entries of one matrix: the gradient's squares, its products with every average,
  // and the averages' squares.
  static constexpr int kMostSums = 1 + 2 * kMostScales;
  DEEPOPT_RULE int sums() const { return 1 + 2 * scales; }

  // read = ahead of the first average + of the gradient + of every further average, each times its
  // share.
  struct Shares {
    float ahead, grad;
    float averages[kMostScales];  // the first is not used
  };

  // Writes the numbers of matrix b. They are computed in double and rounded at the end.
  DEEPOPT_RULE Shares mix(int64_t b, const double* sum) const {
    // As in deepopt/ops/horizons_write.py.
    constexpr double kCosineRetention = 0.7, kCosineFloor = 0.01;
    constexpr double kTiny = FLT_MIN;
    const int K = scales;
    const double size = norm_of(sum[0]), first = retentions[0], t = step[b];
    double foresee[kMostScales], sizes[kMostScales], best = 0;
    for (int k = 0; k < K; ++k) {
      sizes[k] = norm_of(sum[1 + K + k]);
      const double cosine = sum[1 + k] / larger(size, kTiny) / larger(sizes[k], kTiny);
      foresee[k] = lerp(double(foresight[b * K + k]), clamp(cosine, -1, 1), 1 - kCosineRetention);
      new_foresight[b * K + k] = float(foresee[k]);
      best = k ? larger(foresee[k], best) : foresee[k];
    }
    const double before = grad_size[b];
    const double running = sqrt_(lerp(before * before, size * size, 1 - first));
    new_grad_size[b] = float(running);

    double features[2 * kMostScales + 2];
    for (int k = 0; k < K; ++k) {
      features[k] = (larger(foresee[k], 0) + kCosineFloor) / (larger(best, 0) + kCosineFloor);
      features[K + 1 + k] = sizes[k] / larger(running, kTiny);
    }
    features[K] = best;
    features[2 * K + 1] = log10(t) / 3;
    double values[kMostScales] = {}, total = 0;  // of the further averages, from 1
    for (int h = 0; h < units; ++h) {
      const float* unit = phi + (b * units + h) * (3 * K + 2);
      double drive = unit[2 * K + 2];
      for (int i = 0; i < 2 * K + 2; ++i) drive = fma_(double(unit[i]), features[i], drive);
      for (int k = 1; k < K; ++k) {
        values[k] = fma_(double(unit[2 * K + 2 + k]), larger(drive, 0), values[k]);
      }
    }
    for (int k = 1; k < K; ++k) total += values[k] = clamp(values[k], 0, 1);

    Shares shares{1, 0, {}};
    double own = 1, of_grad = 0;
    for (int k = 1; k < K; ++k) {
      const double weight = values[k] / larger(total, 1), kept = retentions[k];
      weights[b * (K - 1) + k - 1] = float(weight);
      const double share = weight * (1 - pow(first, t)) / (1 - pow(kept, t));
      own -= weight;
      of_grad = fma_(share, 1 - kept, of_grad);
      shares.averages[k] = float(share * kept);
    }
    shares.ahead = float(own);
    shares.grad = float(of_grad);
    return shares;
  }

  // Writes the gradient's entry into the first average's; returns what is read from the two.
  static DEEPOPT_RULE float take_first(float& average, float grad, float retention, float fresh,
                                       float ahead, float share) {
    average = lerp(average, grad, fresh);
    return fma_(share, grad, ahead * lerp(grad, average, retention));
  }

  // The same for a further average; returns the sum of what has been read so far.
  static DEEPOPT_RULE float take_next(float& average, float grad, float fresh, float share,
                                      float read) {
    average = lerp(average, grad, fresh);
    return fma_(share, average, read);
  }

 private:
  // As torch's maximum and clamp: NaN stays NaN.
  static DEEPOPT_RULE double larger(double a, double b) { return a > b || a != a ? a : b; }
  static DEEPOPT_RULE double clamp(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
  }
};

}  // namespace deepopt
