// How far an orthogonalized update goes, row by row. From the products of its rows, and the norms
// of gradient and momentum, the rule computes the factor of every row. It works in double, in which
// no square of a float leaves the range; state and factors are float32.
//
// A NaN passes through every comparison, as it passes through torch's clamp.
#pragma once
#include <cfloat>

#include "rule.h"

namespace deepopt {

DEEPOPT_RULE double at_least(double low, double x) { return x < low ? low : x; }
DEEPOPT_RULE double at_most(double high, double x) { return x > high ? high : x; }

constexpr double kTiny = FLT_MIN;  // the least number that is divided by
constexpr double kLeastSize = 0.4, kMostEnlarged = 3;  // deepopt/ops/orthogonal_update.py says why

// The arrays have a number for each of the B matrices of a stack, or for each of their rows.
struct ScaleUpdate {
  int64_t batch, rows, columns;
  double beta1, beta2, rms_cap, rms;
  const float* products;  // of rows, as row_products has them: (1 or 3, B, m)
  const float* weight;  // factor of the second update; null: there is none
  const float *gradient, *momentum;  // norms of both
  const float *grad_norm, *step;  // null: the root mean square is rms alone
  const float *row_moment, *row_weight;  // null: rows stay as they are
  float *new_grad_norm, *new_row_moment, *new_row_weight;
  float* factors;  // for each update and matrix, or for each of its rows if rows are normalized

  // The squared norm of row i of matrix b, in the weighted sum of both updates.
  DEEPOPT_RULE double square(int64_t b, int64_t i) const {
    const int64_t at = b * rows + i, all = batch * rows;
    if (!weight) return products[at];
    const double w = weight[b], xx = products[at], xy = products[all + at];
    // The products are rounded: their sum may come out below zero.
    return at_least(0, xx + 2 * w * xy + w * w * products[2 * all + at]);
  }

  // sqrt(beta root^2 + (1 - beta) value^2)
  DEEPOPT_RULE float running_root(double root, double value) const {
    return float(sqrt_(beta2 * root * root + (1 - beta2) * value * value));
  }

  // The root mean square that AdamW's update would have, enlarged where it is small.
  DEEPOPT_RULE double size(int64_t b, double root) const {
    const double first = 1 - pow(beta1, double(step[b])), second = 1 - pow(beta2, double(step[b]));
    const double ratio = at_most(1, momentum[b] / first / at_least(kTiny, root / sqrt_(second)));
    return at_least(ratio, at_most(kLeastSize, kMostEnlarged * ratio));
  }

  // The factor that gives a semi-orthogonal matrix a root mean square of 1. A matrix of smaller
  // norm, which lacks rank, is enlarged by up to rms_cap on top.
  DEEPOPT_RULE double enlarge(double norm) const {
    const double side = double(rows < columns ? rows : columns);
    const double other = double(rows < columns ? columns : rows);
    return sqrt_(other) * at_most(rms_cap, at_least(1, sqrt_(side) / norm));
  }

  DEEPOPT_RULE double mean(int64_t at) const {
    return at_least(kTiny, new_row_moment[at] / at_least(kTiny, new_row_weight[at]));
  }

  // Writes a row's mean square into its running mean, and returns that. Zero rows do not count.
  DEEPOPT_RULE double take(int64_t at, double square) const {
    const double moment = row_moment[at], of = row_weight[at];
    const bool seen = square > 0;
    new_row_moment[at] = float(seen ? moment + (1 - beta2) * (square - moment) : moment);
    new_row_weight[at] = float(seen ? of + (1 - beta2) * (1 - of) : of);
    return mean(at);
  }

  // The whole rule for matrix b. A team of threads shares the rows: each member takes those from
  // first() on, step() apart, and sum() adds what all members have, always in the same order.
  template <class Team>
  DEEPOPT_RULE void operator()(int64_t b, const Team& team) const {
    double whole = 0, together = 0;
    for (int64_t i = team.first(); i < rows; i += team.step()) {
      whole += products[b * rows + i];
      if (weight) together += square(b, i);
    }
    const double length = sqrt_(at_least(kTiny, team.sum(whole)));
    double shrink = 1;
    if (weight) shrink = length / sqrt_(at_least(kTiny, team.sum(together)));
    double factor = shrink * enlarge(length) * rms;
    if (grad_norm) {
      const float root = running_root(grad_norm[b], gradient[b]);
      factor *= size(b, root);
      if (team.first() == 0) new_grad_norm[b] = root;
    }
    if (!row_moment) {
      if (rows && team.first() == 0)
        write(b, batch, b, factor);  // a matrix without rows has null arrays
      return;
    }
    const double unit = shrink * shrink / double(columns);
    double before = 0, after = 0;
    for (int64_t i = team.first(); i < rows; i += team.step()) {
      const double now = square(b, i) * unit;
      before += now;
      after += now / take(b * rows + i, now);
    }
    before = at_least(kTiny, team.sum(before));
    after = at_least(kTiny, team.sum(after));
    factor *= sqrt_(before / after);
    for (int64_t i = team.first(); i < rows; i += team.step()) {
      write(b, batch * rows, b * rows + i, factor / sqrt_(mean(b * rows + i)));
    }
  }

 private:
  DEEPOPT_RULE void write(int64_t b, int64_t all, int64_t at, double factor) const {
    factors[at] = float(factor);
    if (weight) factors[all + at] = float(factor * weight[b]);
  }
};

}  // namespace deepopt
