"""Which forward passes are counted, and that ranks divide the tables."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from mf_train.model import MemoryFormer, ModelConfig
from mf_train.model.memory import record_codes
from mf_train.telemetry.counts import ReadCounts

CONFIG = ModelConfig(
    hidden_size=24, num_layers=2, num_heads=2, bits=3, expand_bits=1, vocab_size=64, sequence_length=40
)
CPU = torch.device("cpu")


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(64, (6, 40), generator=torch.Generator().manual_seed(seed))


def test_micro_batches_are_added_and_passes_outside_are_not() -> None:
    model = MemoryFormer(CONFIG, seed=1)
    counts = ReadCounts(model, CONFIG.num_tables, CPU)
    model(tokens(0))
    seen = []
    for rows in tokens(1).split(2):
        with counts.counting(), record_codes(model) as codes:
            model(rows)
        seen.append(codes)
        with torch.no_grad():
            model(tokens(2))  # as validation between steps
    assert set(counts.by_hash) == set(seen[0]) and len(seen[0]) == 6
    for name, found in counts.by_hash.items():
        whole = torch.cat([codes[name].flatten(0, -2) for codes in seen])
        expected = torch.stack([torch.bincount(table, minlength=found.shape[1]) for table in whole.T.long()])
        assert torch.equal(found, expected)
    counts.clear()
    assert not counts.values.any()


def test_ranks_count_their_own_tables() -> None:
    whole, parts = MemoryFormer(CONFIG, seed=1), [MemoryFormer(CONFIG, seed=1) for _ in range(4)]
    counts = ReadCounts(whole, 8, CPU)
    of_rank = [ReadCounts(model, 8, CPU, rank, 4) for rank, model in enumerate(parts)]
    for model, each in zip([whole, *parts], [counts, *of_rank], strict=True):
        with each.counting():
            model(tokens(3))
    assert all(4 * each.values.numel() == counts.values.numel() for each in of_rank)
    for name, expected in counts.by_hash.items():
        assert torch.equal(torch.cat([each.by_hash[name] for each in of_rank]), expected)


def test_recomputed_passes_count_once() -> None:
    model = MemoryFormer(CONFIG, seed=1)
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *given, plain=plain: checkpoint(plain, *given, use_reentrant=False)  # type: ignore[method-assign]
    counts, passes = ReadCounts(model, CONFIG.num_tables, CPU), []
    model.blocks[0].hash_ffn.register_forward_hook(lambda *_: passes.append(1))
    with counts.counting():
        model(tokens(4), tokens(5)).mean().backward()
    assert len(passes) == 2  # it was run again
    for found in counts.by_hash.values():
        assert found.sum(-1).eq(6 * 40).all()


def test_a_failed_pass_ends_the_counting() -> None:
    model = MemoryFormer(CONFIG, seed=1)
    counts = ReadCounts(model, CONFIG.num_tables, CPU)
    try:
        with counts.counting():
            model(torch.full((1, 4), 64))
    except IndexError:
        pass
    model.blocks[0].hash_ffn(torch.randn(5, 24))
    assert not counts.values.any()
