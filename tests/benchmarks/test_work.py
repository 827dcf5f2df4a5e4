"""The counts of bytes and FLOPs, against independent ones."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import work
from benchmarks.speed.optimizers import matrix_optimizers
from benchmarks.work import Phase, Rates
from deepopt import ops

RATES = Rates(copy=1.0, stream=10.0, float32=100.0, bfloat16=1000.0)


def counted_by_torch(make, shape):
    """FLOPs of the products in a second step, on the slow reference, which hides none of them."""
    param = nn.Parameter(torch.randn(shape))
    param.grad = torch.randn(shape)
    optimizer = make([param])
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # Newton-Schulz step by step, as by the textbook
    try:
        with ops.backend("reference"):
            optimizer.step()
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
    finally:
        torch.set_float32_matmul_precision(precision)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize(
    "name",
    [
        "torch Muon",
        "DeepMomentum linear",
        "DeepMomentum delta",
        "M3",
        "DMGD row",
        "DMGD coordinate",
    ],
)
def test_the_textbooks_flops_are_those_that_torch_counts(name, shape):
    make, rule, period = matrix_optimizers("cpu")[name]
    expected = work.total_flops(rule(*shape, least=False))
    if period > 1:  # the second step has no slow read-out
        expected -= work.total_flops(work.newton_schulz(*shape)) / period
    assert counted_by_torch(make, shape) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_covariance_memory_multiplies_twice_more_than_the_linear_one(shape):
    make = matrix_optimizers("cpu")["DeepMomentum covariance"][0]
    phases = work.covariance(*shape, root_flops=lambda r: 0.0)
    assert counted_by_torch(make, shape) == work.total_flops(phases)


def test_the_mlp_memorys_products_are_the_linear_ones_and_those_of_its_few_units():
    make = matrix_optimizers("cpu")["DeepMomentum mlp"][0]
    units, inputs, outputs = 2, 6, 1
    few = 2 * units * (inputs + outputs)
    assert counted_by_torch(make, (24, 40)) == work.total_flops(work.mlp(24, 40)) + few


def test_adamw_moves_28_bytes_per_float32_element_and_14_in_bfloat16():
    assert work.total_bytes(work.adamw(1000)) == 28_000
    assert work.total_bytes(work.adamw(1000, 2, 2)) == 14_000
    assert work.total_bytes(work.adamw(1000, 2)) == 22_000


def test_the_least_arithmetic_is_half_of_what_is_symmetric_or_the_gram_form():
    r = 64
    square, wide = work.newton_schulz(r, r, least=True), work.newton_schulz(r, 4 * r, least=True)
    assert work.total_flops(square) == 5 * 4 * r**3  # 5 (3 r²R + r³) and 3 r²R + 17 r³ tie
    assert work.total_flops(wide) == (3 * 4 + 17) * r**3
    assert work.total_flops(work.newton_schulz(r, 4 * r)) == 5 * (4 * 4 + 2) * r**3
    assert work.newton_schulz(4 * r, r, least=True) == wide


def test_phases_add_up_and_each_takes_the_longer_of_its_two_times():
    phases = [Phase("bytes", 100.0, 10.0), Phase("FLOPs", 1.0, 5000.0, "bfloat16")]
    assert work.traffic_seconds(phases, RATES) == pytest.approx(10.1)
    assert work.product_seconds(phases, RATES) == pytest.approx(5.1)
    assert work.roofline_seconds(phases, RATES) == pytest.approx(15.0)


def test_matrices_of_one_shape_are_one_batch():
    phases = work.over([(4, 8), (8, 4), (4, 8)], work.linear)
    single = work.linear(4, 8)
    assert len(phases) == 2 * len(single)
    assert phases[0].bytes == 2 * single[0].bytes


def test_the_mlps_flops_are_those_of_its_formula():
    features, units = 2, work.HIDDEN
    drive = features + features - 1
    assert work.coordinate_mlp_flops(features) == units * (drive + 1 + 2)
    assert work.coordinate_mlp_flops(features, 23) - work.coordinate_mlp_flops(features) == (
        units * 22
    )


def test_gpt2_small_has_85_million_parameters_in_matrices():
    shapes = work.transformer(768, 12)
    assert len(shapes) == 48
    assert sum(map(math.prod, shapes)) == 84_934_656


def test_the_momenta_of_m3_are_three_tensors_read_and_three_written_of_which_one_is_narrow():
    momenta = [phase for phase in work.m3(6, 9) if phase.name == "momenta"]
    assert work.total_bytes(momenta) == 6 * 9 * (5 * 4 + 2)
