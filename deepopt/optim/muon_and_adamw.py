"""torch's Muon for matrices beside torch's AdamW for the rest: a rival in one word."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from deepopt.optim.base import evaluated

MUON = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
"""Arguments of Muon alone; all others are AdamW's, and ``lr`` and ``weight_decay`` are both's."""


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
        own = {key: options.pop(key) for key in MUON if key in options}
        matrices: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in params:
            if not isinstance(group, dict) or "path" not in group:
                raise ValueError(
                    "Invalid params: muon needs groups with a path, to know what is a matrix; give "
                    "the model itself, or deepopt.param_groups(model)"
                )
            for chosen, is_matrix in ((matrices, True), (rest, False)):
                pairs = [
                    pair
                    for pair in group["params"]
                    if is_matrix == (group["path"] == "matrix" and pair[1].ndim == 2)
                ]
                if pairs:
                    chosen.append({**group, "params": pairs})
        if not matrices or not rest:
            raise ValueError(
                "Invalid params: muon is Muon for matrices and AdamW for the rest, and one of the "
                "two has no parameter; make the other one alone"
            )
        matched = {"adjust_lr_fn": "match_rms_adamw", **own}
        self.parts: dict[str, Optimizer] = {
            "muon": Muon(matrices, float(lr), weight_decay, **matched),
            "adamw": AdamW(rest, lr, weight_decay=weight_decay, **options),
        }
        self.defaults = self.parts["muon"].defaults | self.parts["adamw"].defaults
        super().__setstate__({})  # hooks and profiling alone: groups and state are the parts'

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        # Not a ChainMap: looking AdamW's parameter up in Muon's defaultdict would give it a state.
        return {param: own for part in self.parts.values() for param, own in part.state.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.
        """
        loss = None if closure is None else evaluated(closure)
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Those of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of both.

        Raises:
            ValueError: a state of another optimizer.
        """
        if state_dict.keys() != self.parts.keys():
            raise ValueError(
                f"Invalid state_dict: it has the keys {sorted(state_dict)} and not "
                f"{sorted(self.parts)}; make the optimizer that saved it"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "defaults": self.defaults}

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.parts.values()))
