"""Alarms: a hash that collapses raises one, chance does not, and a table is named once until it recovers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mf_train.config import LoggingConfig
from mf_train.model import MemoryFormer, ModelConfig
from mf_train.telemetry.alarms import Alarms, alarm_lines
from mf_train.telemetry.counts import ReadCounts
from mf_train.telemetry.statistics import HashStatistics, table_numbers

CONFIG = ModelConfig(
    hidden_size=48, num_layers=2, num_heads=2, bits=6, expand_bits=2, vocab_size=512, sequence_length=64
)


def drawn(codes: torch.Tensor, rows: int) -> HashStatistics:
    counts = torch.stack([torch.bincount(table, minlength=rows) for table in codes])
    return HashStatistics("blocks.1.hash_ffn", table_numbers(counts))


def read(model: MemoryFormer, tokens: int, seed: int) -> list[HashStatistics]:
    counts = ReadCounts(model, CONFIG.num_tables, torch.device("cpu"))
    ids = torch.randint(512, (tokens // 64, 64), generator=torch.Generator().manual_seed(seed))
    with counts.counting(), torch.no_grad():
        model(ids)
    return [HashStatistics(name, table_numbers(value)) for name, value in counts.by_hash.items()]


def of_hash(found: list[dict[str, Any]], name: str) -> list[list[int]]:
    return [alarm["tables"] for alarm in found if alarm["hash"] == name]


def test_a_collapsed_chunk_is_named_once_and_again_after_it_recovered() -> None:
    model, alarms = MemoryFormer(CONFIG, seed=2), Alarms(LoggingConfig())
    assert alarms.update(read(model, 512, 0)) == []
    norm = model.blocks[1].norm_ffn
    healthy = norm.weight.detach().clone()
    with torch.no_grad():
        norm.weight[12:18], norm.bias[12:18] = 0, 1  # table 2 of 8
    (alarm,) = alarms.update(read(model, 512, 1))
    assert (alarm["hash"], alarm["tables"]) == ("blocks.1.hash_ffn", [2])
    assert alarm["because"] == ["rows_read", "entropy", "largest_share"]
    assert (alarm["rows_read"], alarm["entropy"], alarm["largest_share"]) == (1 / 64, 0, 1)
    assert alarms.update(read(model, 512, 2)) == []
    assert alarms.standing["blocks.1.hash_ffn"] == {2}
    with torch.no_grad():
        norm.weight[30:36], norm.bias[30:36] = 0, -1  # table 5 as well
    assert of_hash(alarms.update(read(model, 512, 3)), "blocks.1.hash_ffn") == [[5]]
    with torch.no_grad():
        norm.weight.copy_(healthy)
        norm.bias.zero_()
    assert alarms.update(read(model, 512, 4)) == [] and not alarms.standing["blocks.1.hash_ffn"]
    with torch.no_grad():
        norm.weight[12:18], norm.bias[12:18] = 0, 1
    assert of_hash(alarms.update(read(model, 512, 5)), "blocks.1.hash_ffn") == [[2]]


def test_a_line_names_layer_tables_and_remedy() -> None:
    codes = torch.zeros(7, 400, dtype=torch.int64)
    (alarm,) = Alarms(LoggingConfig()).update([drawn(codes, 16)])
    (line,) = alarm_lines(40, [alarm])
    assert "\n" not in line and line.startswith(
        "warning: step 40: layer 1 ffn_up: tables 0, 1, 2, 3 and 3 more: "
    )
    assert "entropy 0.000 (uniform 0.9" in line and "optimizer.learning_rate" in line


@pytest.mark.parametrize("rows", [2, 4, 16, 64, 256, 1024, 65536])
@pytest.mark.parametrize("reads", [1, 4, 60, 256, 1000])
def test_a_uniform_code_raises_none_after_few_reads(rows: int, reads: int) -> None:
    generator = torch.Generator().manual_seed(rows + reads)
    codes = torch.randint(rows, (300, reads), generator=generator)
    assert Alarms(LoggingConfig()).update([drawn(codes, rows)]) == []


def test_limits_are_the_configurations() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (4, 1000), generator=generator)
    codes[1] %= 2  # 2 of 16 rows
    codes[3] *= torch.rand(1000, generator=generator) < 0.2  # one row has four fifths
    off = LoggingConfig(alarm_rows_read=0, alarm_entropy=0, alarm_largest_share=1)
    assert Alarms(off).update([drawn(codes, 16)]) == []
    for limits, tables in (
        ({"alarm_rows_read": 0.25}, [1]),
        ({"alarm_largest_share": 0.6}, [3]),
        ({"alarm_entropy": 0.3}, [1]),
        ({"alarm_entropy": 0.6}, [1, 3]),
        ({"alarm_rows_read": 1.0}, [1]),
    ):
        (alarm,) = Alarms(dataclasses.replace(off, **limits)).update([drawn(codes, 16)])
        assert alarm["tables"] == tables, limits
