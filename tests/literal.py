"""The paper's updates in plain NumPy, transcribed from the equations and from nothing in deepopt.

One class per equation: parameters and memories as the paper names them, one call per gradient. The
literal modes of the optimizers are held to these.
"""

import numpy as np


class PreconditionedMomentum:
    """Eq 46, Eq 47: m <- alpha m - eta P g, W <- W + m, for any P that is given."""

    def __init__(self, W, eta, alpha, P=lambda g: g):
        self.W, self.m = W, np.zeros_like(W)
        self.eta, self.alpha, self.P = eta, alpha, P

    def step(self, g):
        self.m = self.decayed(g) - self.eta * self.P(g)
        self.W = self.W + self.m
        return self.W

    def decayed(self, g):
        return self.alpha * self.m


class DeltaMomentum(PreconditionedMomentum):
    """Eq 48, Eq 49 as printed, with the bracket on the right: m <- m (alpha - g'g) - eta P g.

    A vector is a column, for which g'g is a number.
    """

    erase_rate = 1.0

    def decayed(self, g):
        if g.ndim < 2:
            return self.m * (self.alpha - self.erase_rate * np.sum(g * g))
        return self.m @ (self.alpha * np.eye(g.shape[1]) - self.erase_rate * g.T @ g)


class DerivedDeltaMomentum(DeltaMomentum):
    """The gradient step on ||m g' + P||^2 / 2 and a decay: eta stands before g'g as well."""

    @property
    def erase_rate(self):
        return self.eta


class ImplicitDeltaMomentum(PreconditionedMomentum):
    """The proximal step on it: m <- (alpha m - eta P g)(1 + eta g'g)^-1."""

    def step(self, g):
        numerator = self.alpha * self.m - self.eta * self.P(g)
        if g.ndim < 2:
            self.m = numerator / (1 + self.eta * np.sum(g * g))
        else:
            self.m = numerator @ np.linalg.inv(np.eye(g.shape[1]) + self.eta * g.T @ g)
        self.W = self.W + self.m
        return self.W
