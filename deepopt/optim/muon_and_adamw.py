"""torch's Muon for matrices beside torch's AdamW for the rest: a rival in one word."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from deepopt.optim.base import evaluate_closure

MUON = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
"""Arguments of Muon alone. Both take ``lr`` and ``weight_decay``; all others are AdamW's."""


class MuonAndAdamW(Optimizer):
    """``torch.optim.Muon``, which takes matrices alone, and ``torch.optim.AdamW`` as one optimizer.

    ``create_optimizer(model, "muon")`` makes it, so that a comparison changes one word. Updates of
    matrices have the root mean square of AdamW's (``adjust_lr_fn="match_rms_adamw"``), so that one
    learning rate serves both.

    Args:
        params: the groups of ``deepopt.param_groups(model)``; two-dimensional parameters on the
            "matrix" path go to Muon.
        lr: learning rate (default: 1e-3).
        weight_decay: decoupled weight decay (default: 1e-2).
        options: further arguments of Muon or of AdamW.

    Raises:
        ValueError: no parameter for one of the two.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        muon_options = {key: options.pop(key) for key in MUON if key in options}
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for group in params:
            for name, part in _parts_of(group):
                groups[name].append(part)
        if not all(groups.values()):
            raise ValueError(
                "Invalid params: muon is Muon for matrices and AdamW for the rest, and one of the "
                "two has no parameter; make the other one alone"
            )
        muon_options = {"adjust_lr_fn": "match_rms_adamw", **muon_options}
        self.parts: dict[str, Optimizer] = {
            "muon": Muon(groups["muon"], float(lr), weight_decay, **muon_options),
            "adamw": AdamW(groups["adamw"], lr, weight_decay=weight_decay, **options),
        }
        self.defaults = {"lr": lr, "weight_decay": weight_decay}
        self.state = defaultdict(dict)
        self.param_groups = [g for part in self.parts.values() for g in part.param_groups]
        super().__setstate__({})  # hooks and profiling alone: the parts have checked the groups

    def _linked(self) -> Iterator[tuple[str, Optimizer]]:
        """Both optimizers, after they were given the groups and the state that are kept here."""
        for name, part in self.parts.items():
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if _owner(g) == name]
            yield name, part

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Another group, as the constructor takes them.

        Raises:
            ValueError: a group without a path.
        """
        new = dict(_parts_of(param_group))
        for name, part in self._linked():
            if name in new:
                part.add_param_group(new[name])
                self.param_groups.append(part.param_groups[-1])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.
        """
        loss = None if closure is None else evaluate_closure(closure)
        for _, part in self._linked():
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, after a check.

        Raises:
            ValueError: a state of another optimizer.
        """
        groups = state_dict.get("param_groups", [])
        if list(map(_owner, groups)) != list(map(_owner, self.param_groups)):
            raise ValueError(
                "Invalid state_dict: its groups are not those of Muon and AdamW in this optimizer; "
                "make the optimizer that saved it"
            )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __repr__(self) -> str:
        return " and ".join(repr(part) for _, part in self._linked())


def _owner(group: dict[str, Any]) -> str:
    return "adamw" if "betas" in group else "muon"


def _parts_of(group: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """A group cut in two: its matrices for Muon, the rest for AdamW."""
    if not isinstance(group, dict) or "path" not in group:
        raise ValueError(
            "Invalid params: muon needs groups with a path, to know what is a matrix; give the "
            "model itself, or deepopt.param_groups(model)"
        )
    for name in ("muon", "adamw"):
        pairs = [
            pair
            for pair in group["params"]
            if (name == "muon") == (group["path"] == "matrix" and _tensor(pair).ndim == 2)
        ]
        if pairs:
            yield name, {**group, "params": pairs}


def _tensor(given: Any) -> Tensor:
    return given[1] if isinstance(given, tuple) else given
