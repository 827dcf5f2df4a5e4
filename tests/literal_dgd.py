"""Delta gradient descent as the paper prints it, in NumPy and independent of the package."""

import numpy as np


def literal_dgd(weight, inputs, local_errors, eta):
    """Eq 57 for one input x with local error dL/dy, or its mean over a batch of them.

    W <- W (I - eta' x x^T) - eta' (dL/dy) x^T,   eta' = eta / (1 + eta)
    """
    rate = eta / (1 + eta)
    count = len(inputs)
    erase = sum(np.outer(x, x) for x in inputs) / count
    write = sum(np.outer(delta, x) for delta, x in zip(local_errors, inputs, strict=True)) / count
    return weight @ (np.eye(weight.shape[1]) - rate * erase) - rate * write


def exact_dgd(weight, inputs, local_errors, eta):
    """The argmin of Eq 56, 1/2 mean |W x - u|^2 + 1/(2 eta) |W - W_t|^2 with u = -dL/dy, solved."""
    count = len(inputs)
    system = sum(np.outer(x, x) for x in inputs) / count + np.eye(weight.shape[1]) / eta
    target = sum(np.outer(-delta, x) for delta, x in zip(local_errors, inputs, strict=True)) / count
    return np.linalg.solve(system, (target + weight / eta).T).T
