"""The tables' report against counts made another way, over two data-parallel ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from mf_train.model import MemoryFormer, ModelConfig
from mf_train.model.memory import record_codes
from mf_train.training.telemetry import TableTelemetry
from tests.distributed import run_distributed

CONFIG = ModelConfig(
    hidden_size=24, num_layers=1, num_heads=2, bits=3, expand_bits=1, vocab_size=64, sequence_length=40
)


def telemetry_of_rank(
    rank: int, world_size: int
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    model = MemoryFormer(CONFIG, seed=1)
    telemetry = TableTelemetry(model, dist.group.WORLD)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(64, (6, 40), generator=generator)
    model(tokens)  # before start: not counted
    telemetry.start()
    seen = []
    for rows in tokens.split(3):
        with record_codes(model) as codes:
            model(rows)
        seen.append(codes)
    report = telemetry.finish()
    model(tokens)  # after finish: not counted
    telemetry.start()
    assert telemetry.finish() == {}
    return report, {name: torch.cat([codes[name] for codes in seen]) for name in seen[0]}


def test_report() -> None:
    results = run_distributed(telemetry_of_rank, 2, init=True)
    reports = [report for report, _ in results]
    assert reports[0] == reports[1]
    for name, report in reports[0].items():
        codes = torch.cat([codes[name] for _, codes in results]).flatten(0, -2)
        rows = 2 ** (4 if name.endswith("inner") else 3)
        read, entropy, largest = 0, 0.0, 0.0
        for table in codes.T.tolist():
            shares = [count / len(table) for count in Counter(table).values()]
            read += len(shares)
            entropy -= sum(share * torch.tensor(share, dtype=torch.float64).log2().item() for share in shares)
            largest = max(largest, *shares)
        tables = codes.shape[1]
        assert report["rows_read"] == pytest.approx(read / (tables * rows))
        bits = torch.tensor(rows).log2().item()
        assert report["entropy"] == pytest.approx(entropy / tables / bits, rel=1e-6)
        assert report["largest_share"] == pytest.approx(largest)
