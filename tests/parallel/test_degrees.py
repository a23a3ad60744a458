"""Degrees: which rank is what, and the refusal of what does not divide, with its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mf_train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    TrainingConfig,
)
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.parallel.degrees import (
    Degrees,
    check_degrees,
    count_micro_batches,
    micro_batch_sizes,
    rows_of_rank,
)
from tests.training.runs import REPOSITORY


def make_config(tensor: int = 1, batch: int = 64, micro: int = 2, **model: Any) -> Config:
    sizes = {"hidden_size": 96, "bits": 4, "num_heads": 8, "num_layers": 1, "vocab_size": 64}
    return Config(
        model=ModelConfig(**sizes | model),
        parallel=ParallelConfig(tensor=tensor),
        training=TrainingConfig(global_batch_size=batch, micro_batch_size=micro),
        data=DataConfig(logical_streams=64),
    )


def test_neighbours_are_tensor_parallel() -> None:
    places = [Degrees(rank, 8, 2) for rank in range(8)]
    assert [(d.data_rank, d.tensor_rank) for d in places] == [(r // 2, r % 2) for r in range(8)]
    assert {d.data for d in places} == {4}


@pytest.mark.parametrize(("tensor", "world_size"), [(1, 1), (1, 8), (2, 2), (2, 16), (4, 4), (8, 64)])
def test_what_divides_is_accepted(tensor: int, world_size: int) -> None:
    check_degrees(make_config(tensor, num_heads=8, hidden_size=96), world_size)


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [
        (make_config(2), 3, ["parallel.tensor 2 does not divide", "processes 3"]),
        (make_config(4), 2, ["parallel.tensor 4 does not divide", "processes 2"]),
        (
            make_config(16, hidden_size=256, num_heads=16),
            16,
            ["parallel.tensor is 16", "choose 1, 2, 4 or 8"],
        ),
        (make_config(3), 3, ["parallel.tensor is 3", "choose 1, 2, 4 or 8"]),
        (make_config(8, hidden_size=48, num_heads=8, bits=4), 8, ["parallel.tensor 8", "tables", " 12"]),
        (make_config(4, num_heads=6), 4, ["parallel.tensor 4", "model.num_heads 6"]),
        (make_config(2, num_heads=3), 2, ["parallel.tensor 2", "model.num_heads 3"]),
        (make_config(4, vocab_size=66), 4, ["parallel.tensor 4", "model.vocab_size 66"]),
        (make_config(4, kind="dense", num_heads=6), 4, ["parallel.tensor 4", "model.num_heads 6"]),
        (
            make_config(4, ffn="product_key", product_heads=6),
            4,
            ["parallel.tensor 4", "model.product_heads 6", "choose a divisor"],
        ),
        (
            make_config(4, ffn="low_rank", rank=6),
            4,
            ["parallel.tensor 4", "model.rank 6", "choose a divisor"],
        ),
        (
            make_config(1, batch=10),
            11,
            ["training.global_batch_size 10", "11 data-parallel", "10 processes at most"],
        ),
        (
            make_config(2, batch=3),
            8,
            ["training.global_batch_size 3", "4 data-parallel", "6 processes at most", "to 4"],
        ),
    ],
)
def test_what_cannot_work_is_refused_with_its_numbers(
    config: Config, world_size: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        check_degrees(config, world_size)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("moments", [{"table_exp_avg": "int8"}, {"table_exp_avg_sq": "row"}])
@pytest.mark.parametrize(
    ("stage", "ranks", "refused"), [(3, 4, False), (3, 3, True), (3, 7, True), (2, 7, False)]
)
def test_stage_3_cuts_no_row_that_is_held_together(
    moments: dict[str, Any], stage: int, ranks: int, refused: bool
) -> None:
    config = make_config()
    config = replace(
        config, optimizer=OptimizerConfig(**moments), parallel=replace(config.parallel, zero_stage=stage)
    )
    if not refused:
        check_degrees(config, ranks)
        return
    with pytest.raises(UserError, match=f"table_exp_avg.*{ranks} data-parallel ranks do not divide 64 rows"):
        check_degrees(config, ranks)


def test_stage_3_has_masters_of_its_own() -> None:
    config = make_config()
    config = replace(config, parallel=replace(config.parallel, zero_stage=3, master="split"))
    with pytest.raises(UserError, match=r"parallel\.master is 'split' and parallel\.zero_stage is 3"):
        check_degrees(config, 1)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_what_is_accepted_can_be_split(tensor: int) -> None:
    """Every accepted shape has chunks of norms and head that no rank's border cuts."""
    accepted = 0
    for bits in (1, 2, 3, 5, 8):
        for tables in (tensor, 3 * tensor, 5, 6):
            for heads in (tensor, 2 * tensor, 3):
                for vocab_size in (8, 10, 12):
                    if bits * tables % heads:
                        continue
                    model = {"bits": bits, "hidden_size": bits * tables, "num_heads": heads}
                    config = make_config(tensor, vocab_size=vocab_size, **model)
                    try:
                        check_degrees(config, tensor)
                    except UserError:
                        continue
                    accepted += 1
                    assert all(
                        size % tensor == 0
                        for size in (
                            tables,
                            heads,
                            vocab_size,
                            config.model.hidden_size,
                            config.model.inner_size,
                        )
                    )
    assert accepted > 5


def test_a_vocabulary_of_one_token_is_refused() -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"model\.vocab_size is 1"):
        check_degrees(replace(config, model=replace(config.model, vocab_size=1)), 1)


def test_a_profiled_rank_is_one_of_the_run_s() -> None:
    config = make_config()
    profile = ProfileConfig(steps=1, ranks=(0, 3))
    asked = replace(config, training=replace(config.training, profile=profile))
    check_degrees(asked, 4)
    with pytest.raises(
        UserError, match=r"^training\.profile\.ranks names rank 3 and .* ranks 0 to 1 .*: name"
    ):
        check_degrees(asked, 2)
    check_degrees(replace(config, training=replace(config.training, profile=replace(profile, steps=0))), 2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8, 31, 64, 125])
@pytest.mark.parametrize(("batch", "micro"), [(125, 1), (128, 4), (1024, 32), (200, 1000)])
def test_sequences_are_dealt_evenly_to_any_number_of_ranks(ranks: int, batch: int, micro: int) -> None:
    config = make_config(batch=batch, micro=micro)
    check_degrees(config, ranks)
    rows = [rows_of_rank(config, rank, ranks) for rank in range(ranks)]
    assert sorted(row for part in rows for row in part) == list(range(batch))
    counts = {len(part) for part in rows}
    assert max(counts) - min(counts) <= 1
    steps, sizes = count_micro_batches(config, ranks), micro_batch_sizes(config, ranks)
    assert steps == -(-max(counts) // micro) and micro >= sizes[0] and sizes[-1] >= 1
    for count in counts:
        parts = [count // steps + (index < count % steps) for index in range(steps)]  # as torch.tensor_split
        assert {part or 1 for part in parts} <= {*sizes}


def test_the_base_configuration_starts_on_1_to_1024_data_parallel_ranks() -> None:
    config = load_config(REPOSITORY / "configs" / "base.yaml")
    for ranks in range(1, 1025):
        check_degrees(config, ranks * config.parallel.tensor)
        assert micro_batch_sizes(config, ranks)[0] <= config.training.micro_batch_size
