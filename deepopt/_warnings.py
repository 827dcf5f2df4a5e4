"""Warnings that point at the user's own line."""

import sys
import warnings

LIBRARIES = ("deepopt", "torch")


def warn(message: str) -> None:
    """Warn in the name of the first caller that is neither this package nor torch.

    How many frames lie between depends on the optimizer's class and on torch's wrappers around
    ``step``, so no fixed ``stacklevel`` serves.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
