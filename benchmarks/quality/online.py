"""The losses of a model while it learned, for workloads whose data changes on the way."""

import torch
from torch import Tensor, nn


class Online(nn.Module):
    """A model that keeps its loss on every training batch, from before it learns from it.

    Batches are new to the model, so that these losses are those of a held-out part that moves on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def kept(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss of a batch, which a model that is in training keeps."""
    if torch.is_grad_enabled():
        losses(model).append(loss.item())
    return loss


def losses(model: nn.Module) -> list[float]:
    """One for each step of the training."""
    if not isinstance(model, Online):
        raise TypeError(f"model={type(model).__name__}: must be an Online, which keeps its losses")
    return model.losses
