"""What every class with an orthogonal update shares."""

import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim import output_map
from deepopt.optim.dmgd import DMGD
from deepopt.optim.m3 import M3


@pytest.mark.parametrize(
    ("cls", "options"),
    [(deepopt.DeepMomentum, {}), (M3, {}), (DMGD, {"output_map": "newton_schulz"})],
)
def test_wide_matrices_are_orthogonalized_in_bfloat16_where_that_is_faster(
    cls, options, monkeypatch
):
    def update(faster):
        monkeypatch.setattr(output_map, "multiplies_bfloat16_faster", lambda device: faster)
        seen = []
        orthogonal_update = output_map.orthogonal_update
        monkeypatch.setattr(
            output_map,
            "orthogonal_update",
            lambda c, dtype, *rest: seen.append(dtype) or orthogonal_update(c, dtype, *rest),
        )
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 96), (32, 96))]
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
        cls(params, **options).step()
        monkeypatch.undo()
        return params[0].detach(), seen

    exact, dtypes = update(faster=False)
    assert dtypes == [torch.float32, torch.float32]
    rounded, dtypes = update(faster=True)
    assert dtypes == [torch.bfloat16, torch.float32]
    assert 0 < (rounded - exact).norm() < 0.03 * exact.norm()


def test_step_counts_of_another_default_dtype_do_not_keep_the_kernel_away(monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    param = nn.Parameter(torch.randn(4, 5, dtype=torch.float32))
    param.grad = torch.ones_like(param)
    optimizer = deepopt.DeepMomentum([param], path="matrix")
    chosen = []
    kernels = output_map.orthogonal_update

    def orthogonal_update(*given):
        chosen.append(kernels.backend_for(*given))
        return kernels(*given)

    monkeypatch.setattr(output_map, "orthogonal_update", orthogonal_update)
    optimizer.step()
    assert optimizer.state[param]["step"].dtype == torch.float64
    assert chosen == ["cpu" if kernels.has_backend("cpu") else "reference"]
