"""Which GPU is a process's own."""

from __future__ import annotations

import pytest

from mf_train.errors import UserError
from mf_train.training.device import gpu_index


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees() -> None:
    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("local_rank", "visible"), [(2, 2), (7, 4), (0, 0), (3, 0)])
def test_a_process_without_a_gpu_of_its_own_is_refused(local_rank: int, visible: int) -> None:
    with pytest.raises(
        UserError, match=rf"local rank {local_rank} has no GPU of its own \({visible} visible\)"
    ):
        gpu_index(local_rank, visible)
