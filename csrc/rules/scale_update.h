// How far an orthogonalized update goes, row by row: from the products of its rows and the norms of
// gradient and momentum to the factor of every row. In double, where no square of a float leaves
// the range; what is kept or multiplied with is float32.
//
// A NaN goes through every comparison, as it does through torch's clamp.
#pragma once
#include <cfloat>

#include "rule.h"

namespace deepopt {

DEEPOPT_RULE double at_least(double low, double x) { return x < low ? low : x; }
DEEPOPT_RULE double at_most(double high, double x) { return x > high ? high : x; }

constexpr double kTiny = FLT_MIN;  // what a norm of zero counts as where it divides

// For a stack of B matrices; arrays have a number for each of them, or for each of their rows.
struct ScaleUpdate {
  int64_t batch, rows, columns;
  double beta1, beta2, rms_cap, update_rms;
  const float* products;                 // of rows, as row_products has them: (1 or 3, B, m)
  const float* weight;                   // of the second update; null: there is none
  const float *gradient, *momentum;      // their norms
  const float* gain;                     // the momentum's norm is so many times that; null: once
  const float *grad_norm, *step;         // null: the size is update_rms
  const float *row_moment, *row_weight;  // null: rows stay as they are
  float *new_grad_norm, *new_row_moment, *new_row_weight;
  float* factors;  // of each update, of each of its rows if they change

  // The squared norm of row i of matrix b, of both updates together.
  DEEPOPT_RULE double square(int64_t b, int64_t i) const {
    const int64_t at = b * rows + i, all = batch * rows;
    if (!weight) return products[at];
    const double w = weight[b], xx = products[at], xy = products[all + at];
    return at_least(0, xx + 2 * w * xy + w * w * products[2 * all + at]);  // products are rounded
  }

  // sqrt(beta root^2 + (1 - beta) value^2)
  DEEPOPT_RULE float running_root(double root, double value) const {
    return float(sqrt_(beta2 * root * root + (1 - beta2) * value * value));
  }

  // The root mean square that AdamW's update would have.
  DEEPOPT_RULE double size(int64_t b, double root) const {
    const double first = 1 - pow(beta1, double(step[b])), second = 1 - pow(beta2, double(step[b]));
    const double norm = gain ? double(momentum[b]) * gain[b] : momentum[b];
    return at_most(1, norm / first / at_least(kTiny, root / sqrt_(second)));
  }

  // Brings a matrix of this norm to that of an orthogonal one whose entries are 1 on average.
  DEEPOPT_RULE double enlarge(double norm) const {
    const double side = double(rows < columns ? rows : columns);
    const double other = double(rows < columns ? columns : rows);
    return sqrt_(other) * at_most(rms_cap, at_least(1, sqrt_(side) / norm));
  }

  DEEPOPT_RULE double mean(int64_t at) const {
    return at_least(kTiny, new_row_moment[at] / at_least(kTiny, new_row_weight[at]));
  }

  // Takes the mean square of a row into its running mean, which it returns. Zero rows do not count.
  DEEPOPT_RULE double take(int64_t at, double square) const {
    const double moment = row_moment[at], of = row_weight[at];
    const bool seen = square > 0;
    new_row_moment[at] = float(seen ? moment + (1 - beta2) * (square - moment) : moment);
    new_row_weight[at] = float(seen ? of + (1 - beta2) * (1 - of) : of);
    return mean(at);
  }

  // All of matrix b. A team shares its rows: `first`, `step`, and the `sum` of what its members
  // have, in an order of its own that is always the same.
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
    double factor = shrink * enlarge(length);
    if (grad_norm) {
      const float root = running_root(grad_norm[b], gradient[b]);
      factor *= size(b, root);
      if (team.first() == 0) new_grad_norm[b] = root;
    } else {
      factor *= update_rms;
    }
    if (!row_moment) {
      if (rows && team.first() == 0) write(b, batch, b, factor);  // without rows all arrays are null
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
