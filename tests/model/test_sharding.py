"""Slices of parameters: shapes there and back, and who holds what."""

from __future__ import annotations

import pytest
import torch

from mf_train.model.sharding import ranks_of_span, slice_of_rank, slice_shape, split_dimension, whole_shape

SHAPES = {
    "layers.0.ffn.down.tables": (3, 4, 8),
    "embedding.weight": (6, 8),
    "head.weight": (8, 6),
    "norm.bias": (8,),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slices_are_equal_and_make_up_the_whole(name: str, ranks: int) -> None:
    whole = torch.rand(SHAPES[name])
    parts = [slice_of_rank(whole, name, rank, ranks) for rank in range(ranks)]
    assert {tuple(part.shape) for part in parts} == {slice_shape(name, whole.shape, ranks)}
    assert whole_shape(name, parts[0].shape, ranks) == tuple(whole.shape)
    assert torch.equal(torch.cat(parts, split_dimension(name)), whole)


def test_a_span_is_held_by_the_ranks_that_it_crosses() -> None:
    assert list(ranks_of_span(slice(3, 9), 4)) == [(0, 3, 4), (1, 4, 8), (2, 8, 9)]
    assert list(ranks_of_span(slice(4, 8), 4)) == [(1, 4, 8)]
