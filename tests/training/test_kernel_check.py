"""The check of a device's kernels finds what computes wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mf_train.kernels import describe, lookup
from mf_train.training.kernel_check import check_kernels

CPU = torch.device("cpu")


def test_this_machine_computes_right() -> None:
    assert check_kernels(CPU) == describe(CPU)


@pytest.mark.parametrize("value", [1e-3, float("nan"), float("inf")])
def test_one_wrong_value_is_found(value: float) -> None:
    def broken(codes: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
        y = lookup(codes, weights, tables)
        y[100, 7] += value * y.abs().max()
        return y

    with pytest.raises(
        ArithmeticError, match="on cpu computed 0 of 8192 codes wrong, and sums that differ by"
    ):
        check_kernels(CPU, broken)
