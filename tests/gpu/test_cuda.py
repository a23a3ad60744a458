"""The CUDA lookup of sm_90 on a GPU: against float64, and to the bit where bfloat16 makes that possible."""

from __future__ import annotations

import pytest
import torch

from mf_train.kernels import cuda, reference
from tests.gpu.device import device_or_skip
from tests.kernels.test_cuda import BF16, F32, assert_right, random_arguments

device_or_skip()
pytestmark = [
    pytest.mark.skipif(not cuda.is_available(), reason=cuda.unavailable_reason() or "available"),
    pytest.mark.usefixtures("settled_device"),
]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("bits", range(1, 11))
def test_lookup(bits: int, dtype: torch.dtype) -> None:
    for tokens, num_tables, columns in [
        (0, 3, 64),
        (1, 1, 8),
        (777, 9, 200),
        (5000, 33, 72),
        (20000, 16, 136),
    ]:
        codes, weights, tables = random_arguments(bits, tokens, num_tables, bits, columns, dtype, "cuda")
        half = tables[..., : columns // 16 * 8].contiguous()
        for kind in {codes.dtype, torch.int16, torch.int32, torch.int64}:
            y, y_half = cuda.lookup(codes.to(kind), weights.float(), [tables, half])
            assert_right(y, codes, weights, tables)
            assert torch.equal(y[:, : half.shape[2]], y_half)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_code_outside_its_table_gives_nan_to_its_token_alone(dtype: torch.dtype) -> None:
    codes, weights, tables = random_arguments(4, 3000, 5, 7, 64, dtype, "cuda")
    expected = reference.lookup(codes, weights, tables)
    codes = codes.long()
    for token, code in {0: 128, 7: -1, 1531: 2**40, 2999: -(2**63)}.items():
        codes[token, token % 5] = code
        expected[token] = torch.nan
    (y,) = cuda.lookup(codes, weights, [tables])
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-5, equal_nan=True)


def test_tables_of_more_than_two_to_the_31_elements() -> None:
    codes, weights, tables = random_arguments(6, 5, 2100, 10, 1024, BF16, "cuda")
    assert tables.numel() > 2**31
    (y,) = cuda.lookup(codes, weights, [tables])
    assert_right(y, codes, weights, tables)


def test_lookup_in_a_cuda_graph_and_on_another_stream() -> None:
    codes, weights, tables = random_arguments(8, 3000, 9, 8, 128, BF16, "cuda")
    cuda.lookup(codes, weights, [tables])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y,) = cuda.lookup(codes, weights, [tables])
    weights.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert_right(y, codes, weights, tables)
