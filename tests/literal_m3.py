"""M3 in NumPy: Alg. 1 line by line, and the settled form in the plainest words.

Independent of torch and of the package, whose results the tests hold against these.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def newton_schulz(matrix: Array, coefficients: Sequence[tuple[float, float, float]]) -> Array:
    """X <- a X + b X XᵀX + c X (XᵀX)² from X = M / ‖M‖; the zero matrix stays zero."""
    norm = np.sqrt((matrix**2).sum())
    x = matrix / norm if norm > 0 else matrix
    for a, b, c in coefficients:
        gram = x.T @ x
        x = a * x + b * x @ gram + c * x @ gram @ gram
    return x


def literal(theta, grads, *, lr, betas, eps, alpha, chunk, coefficients):
    """Alg. 1 with the f gradients of the last chunk in line 3; yields Θ after every step."""
    beta1, beta2, beta3 = betas
    m1, m2, v = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    for k in range(-(-len(grads) // chunk)):
        m2 = m2 + beta3 * sum(grads[max(0, k - 1) * chunk : k * chunk], np.zeros_like(theta))
        o2 = newton_schulz(m2, coefficients)
        for g in grads[k * chunk : (k + 1) * chunk]:
            m1 = m1 + beta1 * g
            v = v + beta2 * g**2
            o1 = newton_schulz(m1, coefficients)
            theta = theta - lr * (o1 + alpha * o2) / (np.sqrt(v) + eps)
            yield theta


def settled(theta, grads, *, lr, decay, betas, beta3, alpha, chunk, ramp, cap, mix, coefficients):
    """The settled form without row normalization and gate; yields Θ after every step."""
    beta1, beta2 = betas
    rank, longest = min(theta.shape), max(theta.shape)
    m1, m2, square = np.zeros_like(theta), np.zeros_like(theta), 0.0

    def norm(x):
        return np.sqrt((x**2).sum())

    for t, g in enumerate(grads, 1):
        k, done = divmod(t - 1, chunk)  # chunks that have ended, steps of the present one
        if done == 0:
            o2 = newton_schulz(m2, coefficients)
            kept = min(beta3, k / (k + 4))
            begun = kept * m2
        begun = begun + (1 - kept) * g / chunk
        if done == chunk - 1:
            m2 = begun
        weight = alpha * min(1, k * chunk / max(ramp, 1))
        m1 = beta1 * m1 + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * norm(g) ** 2
        ahead = beta1 * m1 + (1 - beta1) * g
        if mix == "post":
            o1 = newton_schulz(ahead, coefficients)
            update = o1 + weight * o2
            update = update * norm(o1) / norm(update)
        else:
            update = newton_schulz(ahead / norm(ahead) + weight * begun / norm(begun), coefficients)
        gain = min(max(1.0, np.sqrt(rank) / norm(update)), cap)
        ratio = norm(ahead) / (1 - beta1**t) / np.sqrt(square / (1 - beta2**t))
        size = max(min(1.0, ratio), min(0.4, 3 * ratio))
        step = size * np.sqrt(longest) * gain * update
        theta = (1 - lr * decay) * theta - lr * step
        yield theta
