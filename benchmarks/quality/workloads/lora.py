"""The fine-tuning of the small Llama by LoRA of rank 16: two factors beside every frozen matrix."""

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import llama_tuned

RANK, SCALE = 16, 2.0


class LoRA(nn.Module):
    """A frozen linear layer plus ``SCALE`` times the product of two factors; the second is zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + SCALE * self.lora_B(self.lora_A(x))


def data(seed: int, step: int) -> language.Text:
    return llama_tuned.data(seed, step)


def model() -> nn.Module:
    model = llama_tuned.model().requires_grad_(False)
    for module in list(model.layers.modules()):  # type: ignore[union-attr]
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    return model


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return llama_tuned.metrics(model)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=100,
    about="the same fine-tuning by LoRA of rank 16 on every matrix of the blocks",
    sha256=lambda: llama_tuned.topics().sha256,
)
