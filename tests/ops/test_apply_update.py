import pytest
import torch

from deepopt.ops import adamw_, apply_update_, backend
from deepopt.ops.operator import UNAVAILABLE
from deepopt.ops.rounding import to_fp32

kernels = pytest.mark.parametrize(
    "backend_name",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif("cpu" in UNAVAILABLE, reason="not built")),
    ],
)


@kernels
def test_the_rule_is_decay_and_a_step(backend_name):
    param, update = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = (1 - 0.1 * 0.5) * param - 0.1 * update
    with backend(backend_name):
        apply_update_([param], [update], [], [], 0.1, 0.5)
    torch.testing.assert_close(param, expected)


@kernels
def test_with_its_low_bits_a_bfloat16_parameter_is_a_float32_one(backend_name):
    """Bit for bit over many steps that are too small for bfloat16, AdamW's included."""
    exact = torch.randn(50, 40)
    exact.view(torch.int32)[0] = torch.arange(40) * 0x1000 + 0x3F800000  # ties, both ways
    high = exact.bfloat16()
    low = torch.zeros(50, 40, dtype=torch.int16)
    with backend(backend_name):
        apply_update_([high], [high.float() - exact], [low], [], 1.0, 0.0)
        assert torch.equal(to_fp32(high, torch.float32, low), exact)
        for _ in range(5):
            update = torch.randn(40, 50).t()
            for param, lows in ((exact, []), (high, [low])):
                apply_update_([param], [update], lows, [], 1e-4, 0.1)
        assert torch.equal(to_fp32(high, torch.float32, low), exact)
        states = [torch.zeros(50, 40) for _ in range(4)]
        steps = [torch.zeros(()), torch.zeros(())]
        for _ in range(5):
            grad, options = torch.randn(50, 40), (1e-4, 0.9, 0.99, 1e-8, 0.1, False)
            adamw_([exact], [grad], states[:1], states[1:2], steps[:1], [], [], *options)
            adamw_([high], [grad], states[2:3], states[3:], steps[1:], [low], [], *options)
    assert torch.equal(to_fp32(high, torch.float32, low), exact)
    assert (high.float() - exact).abs().le(exact.abs() * 2**-8).all()


@kernels
def test_stochastic_rounding_is_right_on_average_and_only_rounds(backend_name):
    value = torch.linspace(1.0, 1.0 + 2**-7, 65)[:, None].expand(65, 4000)
    update = 1.0 - value  # from ones, a step of rate 1 comes to the value
    rounded = torch.zeros(65)
    for seed in range(4):
        param = torch.ones(65, 4000, dtype=torch.bfloat16)
        with backend(backend_name):
            apply_update_([param], [update], [], [seed], 1.0, 0.0)
        assert set(param.unique().tolist()) <= {1.0, 1.0 + 2**-7}
        rounded += param.float().mean(1) / 4
    # 16000 draws between two numbers 2^-7 apart: five standard deviations.
    assert (rounded - value[:, 0]).abs().max() < 5 * 2**-7 * 0.5 / 16000**0.5
    assert rounded[0] == 1.0


@kernels
def test_bits_depend_on_seed_and_place_and_nothing_else(backend_name):
    def moved(seed, layout):
        param = torch.ones(64, 48, dtype=torch.bfloat16)
        view = param if layout == "rows" else param.t()
        with backend(backend_name):
            apply_update_([view], [torch.full(view.shape, -(2.0**-8))], [], [seed], 1.0, 0.0)
        return param

    first = moved(1, "rows")
    assert torch.equal(first, moved(1, "rows"))
    assert torch.equal(first, moved(1, "columns"))
    for seed in (2, -1, 1 + 2**32):
        assert 0.4 < (first != moved(seed, "rows")).float().mean() < 0.6


@kernels
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
def test_what_is_not_finite_stays_so(backend_name, rounding):
    numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    param, low = numbers.bfloat16(), torch.zeros(4, dtype=torch.int16)
    lows = [low] if rounding == "exact" else []
    with backend(backend_name):
        seeds = [1] if rounding == "stochastic" else []
        apply_update_([param], [torch.zeros(4)], lows, seeds, 1.0, 0.0)
    assert param[0].isnan()
    assert param[1:].tolist() == numbers[1:].tolist()


def test_two_ways_to_round_at_once_are_refused():
    param, low = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int16)
    with (
        backend("reference"),
        pytest.raises(ValueError, match="Invalid lows or seeds: 1 and 1 for 1 parameters"),
    ):
        apply_update_([param], [torch.zeros(2)], [low], [1], 1.0, 0.0)
    if "cpu" not in UNAVAILABLE:
        with pytest.raises(RuntimeError, match="lows or seeds, not both"):
            apply_update_([param], [torch.zeros(2)], [low], [1], 1.0, 0.0)


@kernels
def test_a_parameter_set_to_zero_is_zero_whatever_its_low_bits_were(backend_name):
    param = torch.tensor([0.0, -0.0, 1.0]).bfloat16().repeat(40)
    lows = torch.tensor([-1, -(2**15), -1], dtype=torch.int16).repeat(40)
    with backend(backend_name):
        apply_update_([param], [torch.ones(120)], [lows], [], 0.5, 0.0)
    assert param.tolist() == [-0.5, -0.5, 0.5] * 40
