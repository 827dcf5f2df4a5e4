import pytest
import torch

from deepopt.ops import combine, row_products


@pytest.mark.parametrize("by", ["b", "bm"])
def test_the_sum_is_weighted_by_matrix_or_by_row(by):
    tensors = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    factors = torch.randn(3, 2, 4, dtype=torch.float64)[..., 0 if by == "b" else slice(None)]
    expected = torch.einsum(f"kbmn,k{by}->bmn", tensors, factors)
    torch.testing.assert_close(combine(list(tensors), factors), expected)


def test_the_result_has_the_dtype_of_the_coefficients_and_rows_in_order():
    tensor = torch.randn(2, 5, 4).bfloat16().mT
    result = combine([tensor], torch.ones(1, 2))
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert torch.equal(result, tensor.float())


def test_products_are_those_of_the_upper_triangle():
    x, y = torch.randn(2, 3, 4, 5)
    expected = torch.stack([(x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)])
    torch.testing.assert_close(row_products([x, y]), expected)
    assert torch.equal(row_products([x])[0], row_products([x, y])[0])


def test_there_must_be_something_to_combine():
    with pytest.raises((ValueError, RuntimeError), match="at least one"):
        combine([], torch.ones(0, 2))


def test_a_coefficient_for_each_entry_is_not_taken_for_one_of_each_row():
    tensors = [torch.ones(2, 3, 4), torch.ones(2, 4, 3).mT]
    with pytest.raises((RuntimeError, ValueError), match="coefficients"):
        combine(tensors, torch.ones(2, 2, 3, 4))
