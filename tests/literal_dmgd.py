"""DMGD in NumPy, from Eq 50, Eq 51, Eq 52 and their settled form, with gradients by hand."""

import numpy as np


def tanh_mlp(keys, first, last):
    """Values and activations of sqrt(o/h) V tanh(U x / sqrt(i)) for keys (samples, i)."""
    active = np.tanh(keys @ first.T / np.sqrt(first.shape[1]))
    return np.sqrt(last.shape[0] / last.shape[1]) * active @ last.T, active


def tanh_mlp_slopes(keys, first, last, errors):
    """Gradients in U and V of a loss with gradient ``errors`` (samples, o) at the values."""
    _, active = tanh_mlp(keys, first, last)
    factor = np.sqrt(last.shape[0] / last.shape[1])
    below = factor * (errors @ last) * (1 - active**2)
    return below.T @ keys / np.sqrt(first.shape[1]), factor * errors.T @ active


def printed_linear(w, gradient, retention, inner_lr, steps):
    """W += m(u) for m(u) = a * u entry by entry and L = <m(u), 1>."""
    a = np.zeros_like(w)
    for _ in range(steps):
        u = gradient(w)
        a = retention * a - inner_lr * u
        w = w + a * u
    return w


def printed_mlp(w, gradient, retention, inner_lr, steps, first, last):
    """W += m(u) for one MLP over all entries, or over rows, and L = <m(u), 1>.

    The width of ``first`` says which: 1 for entries.
    """
    for _ in range(steps):
        u = gradient(w)
        keys = u.reshape(-1, first.shape[1])
        d_first, d_last = tanh_mlp_slopes(keys, first, last, np.ones_like(keys))
        first = retention * first - inner_lr * d_first
        last = retention * last - inner_lr * d_last
        w = w + tanh_mlp(keys, first, last)[0].reshape(w.shape)
    return w, first, last


def settled(w, gradient, lr, betas, inner_lr, steps, first, last, objective, form, time_scale=0.99):
    """The settled rule for one matrix, with the step's size of AdamW (output map "rms")."""
    first0, last0 = first, last
    mean, slow, second = np.zeros_like(w), np.zeros_like(w), 0.0
    for step in range(1, steps + 1):
        g = gradient(w)
        if form == "coordinate":
            mean = betas[0] * mean + (1 - betas[0]) * g
            slow = time_scale * slow + (1 - time_scale) * g
            linear = mean / (1 - betas[0] ** step)
            keys = np.stack([_unit(g), _unit(mean), _unit(slow)], -1).reshape(-1, 3)
            scale = max(_rms(g), _rms(linear))
            base = -linear / scale
        else:
            keys, scale, base = _unit(g), _rms(g), 0.0
        u = g / scale
        outputs = tanh_mlp(keys, first, last)[0].reshape(w.shape) + base
        errors = (outputs + u if objective == "l2" else u) / w.size
        d_first, d_last = tanh_mlp_slopes(keys, first, last, errors.reshape(len(keys), -1))
        first = first0 + betas[0] * (first - first0) - inner_lr * d_first
        last = last0 + betas[0] * (last - last0) - inner_lr * d_last
        out = scale * (tanh_mlp(keys, first, last)[0].reshape(w.shape) + base)
        second = betas[1] * second + (1 - betas[1]) * np.mean(g**2)
        adam = np.sqrt(second / (1 - betas[1] ** step))
        w = w + lr * out / max(_rms(out), adam)
    return w


def _rms(x):
    return np.sqrt(np.mean(x**2))


def _unit(x):
    return x / _rms(x)
