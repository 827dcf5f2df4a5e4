"""Associative memories (Eq 6) of the gradient stream: a momentum as pure functions of tensors.

A memory knows no optimizer, no parameter group and no schedule. To try your own, write the three
methods of :class:`Memory`, or the two of :class:`OnePass`, and pass the object to
``DeepMomentum(memory=...)``.
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from deepopt.memory.covariance import Covariance
from deepopt.memory.delta import Delta
from deepopt.memory.delta_rule import DeltaRule
from deepopt.memory.elementwise import Elementwise, OuterProduct
from deepopt.memory.entrywise_mlp import EntrywiseMLP
from deepopt.memory.gradient import Gradient
from deepopt.memory.horizons import Horizons
from deepopt.memory.linear import Linear
from deepopt.memory.module import Module
from deepopt.memory.multi_scale import MultiScale
from deepopt.memory.preconditioned import Preconditioned

__all__ = [
    "BUILT_IN",
    "Covariance",
    "Delta",
    "DeltaRule",
    "Elementwise",
    "EntrywiseMLP",
    "Gradient",
    "Horizons",
    "Linear",
    "Memory",
    "Module",
    "MultiScale",
    "OnePass",
    "OuterProduct",
    "Preconditioned",
    "resolve",
]


@runtime_checkable
class Memory(Protocol):
    """A memory of matrix gradients.

    All tensors carry a leading dimension B that stacks independent matrices of one shape, so that
    one call serves every parameter of that shape; row b of a result may depend on row b of the
    arguments only. ``retention`` is the optimizer's ``betas[0]``. It is an argument because
    schedulers change it. The memory's own hyper-parameters are attributes. A checkpoint does not
    hold them; it recognizes a memory by its ``repr``, which a frozen dataclass provides. A memory
    that reads values of tensors on the host says so with a class attribute, ``capturable = False``.
    A number ``gain`` multiplies the measured size of the updates; without it they have AdamW's.
    A method ``report(state)`` may return tensors by name, which ``optimizer.diagnostics`` averages.
    """

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """The empty memory for gradients ``like``, shape (B, m, n): tensors with leading size B.

        Shape, dtype and device of ``like`` count, its values do not: it may be a meta tensor.
        """
        ...

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        """One step of inner learning: assign new tensors to the entries of ``state``.

        Assigning, rather than writing into the old tensors, is what lets an optimizer be
        differentiated. ``state["step"]``, shape (B,) on the CPU, is the number of gradients
        including this one; ``grad`` must not be written to.
        """
        ...

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        """The momentum, shape (B, m, n), right after ``write`` of the same ``grad``.

        The step takes its direction, orthogonalized, and its size from the norm, which should have
        the gradient's units, as an average of gradients has.
        """
        ...


@runtime_checkable
class OnePass(Protocol):
    """A memory that writes and reads in one call.

    One call saves a pass over the matrices, or lets the read use what only the write knows. The
    memory may have ``write`` and ``read`` as well.
    """

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """As :meth:`Memory.init`."""
        ...

    def write_and_read(
        self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor
    ) -> Tensor:
        """:meth:`Memory.write`, and then what :meth:`Memory.read` returns."""
        ...


AnyMemory: TypeAlias = Memory | OnePass

BUILT_IN: dict[str, type[AnyMemory]] = {
    "linear": Linear,
    "covariance": Covariance,
    "delta": Delta,
    "mlp": Horizons,
}


def resolve(memory: Any) -> AnyMemory:
    """The memory behind a name or an object.

    Raises:
        ValueError: an unknown name.
        TypeError: an object without the methods of :class:`Memory`.
    """
    if isinstance(memory, str):
        if memory not in BUILT_IN:
            names = ", ".join(map(repr, BUILT_IN))
            raise ValueError(f"Invalid memory: {memory!r}; choose {names} or pass a Memory object")
        return BUILT_IN[memory]()
    if isinstance(memory, type) or not isinstance(memory, Memory | OnePass):
        raise TypeError(
            f"Invalid memory: {memory!r} is not a Memory object; it needs the methods "
            "init, write and read of deepopt.memory.Memory, or init and write_and_read"
        )
    return memory
