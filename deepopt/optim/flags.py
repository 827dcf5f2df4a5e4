"""The flags that every optimizer of the package has, described once.

The docstring of a class has one line, ``[flags]``, where ``help()`` and the site show this text.
"""

import re
import textwrap

PLACE = re.compile(r"^( *)\[flags\]\n", re.MULTILINE)
TEXT = """\
rounding: how float32 steps reach bfloat16 parameters: "nearest", which loses steps below
    1/256 of a parameter; "stochastic", right on average; or "exact", with the 16 bits that
    a parameter has no room for in its state, half a float (default: "nearest").
foreach: on the element-wise path None is this package's AdamW kernel, or torch's default where
    there is none; True and False are torch's own implementations (default: None).
maximize: ascend instead of descending (default: False).
capturable: keep step counts on the device, so that the step can be captured in a CUDA
    graph, where lr must be a tensor to change (default: False).
differentiable: let autograd run through the step, to optimize what it depends on;
    parameters must not be leaves then (default: False).
fused: keep element-wise step counts on the parameter's device, and let ``GradScaler`` leave
    unscaling and skipping to the step. torch's fused kernel runs where this package's does not
    serve; tensors whose memory order differs from their parameter's are put in order first
    (default: None).
"""


def with_flags(docstring: str) -> str:
    """The docstring with the line ``[flags]`` replaced by the description of the flags."""
    return PLACE.sub(lambda place: textwrap.indent(TEXT, place[1]), docstring)
