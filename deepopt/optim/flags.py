"""The flags that every optimizer of the package has, described once.

The docstring of a class has one line, ``[flags]``, where ``help()`` and the site show this text.
"""

import re
import textwrap

PLACE = re.compile(r"^( *)\[flags\]\n", re.MULTILINE)
TEXT = """\
rounding: how float32 steps reach bfloat16 parameters: "nearest", which loses steps below
    1/256 of a parameter; "stochastic", right on average; or "exact", which keeps the 16 bits
    that do not fit into a parameter in its state, half a float (default: "nearest").
foreach: what steps the element-wise path: None for this package's AdamW kernel, or torch's
    default where there is none; True or False for torch's foreach or for-loop code
    (default: None).
maximize: ascend instead of descending (default: False).
capturable: keep step counts on the device, so that the step can be captured in a CUDA
    graph, in which only an lr that is a tensor can change (default: False).
differentiable: let autograd run through the step, to optimize what it depends on;
    parameters must not be leaves then (default: False).
fused: keep element-wise step counts on the parameter's device, and let ``GradScaler`` leave
    unscaling and skipping to the step. torch's fused kernel runs where this package's does not
    serve; tensors in another memory layout than their parameter's are first copied to its
    layout (default: None).
"""


def with_flags(docstring: str) -> str:
    """The docstring with the line ``[flags]`` replaced by the description of the flags."""
    return PLACE.sub(lambda place: textwrap.indent(TEXT, place[1]), docstring)
