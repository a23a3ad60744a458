"""Which tables are dead or collapsing: said once for a table until it recovers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mf_train.config import LoggingConfig
from mf_train.telemetry.statistics import ENTROPY, LARGEST, READS, ROWS_READ, HashStatistics
from mf_train.telemetry.uniform import uniform_code

# Fewer reads say nothing: even then a uniform code of one bit has its two rows within 15 % of each other.
LEAST_READS = 256
_SHOWN = 4  # tables that a line names
_HASHES = {"hash_attention": "qkv", "hash_output": "output", "hash_ffn": "ffn_up", "hash_inner": "ffn_down"}
_REMEDY = (
    "go back to a checkpoint before it and lower optimizer.learning_rate or raise schedule.warmup_steps, and look at "
    "the run with 'memoryformer inspect'"
)


class Alarms:
    """The tables that are alarming now, by the name of their hash."""

    def __init__(self, limits: LoggingConfig) -> None:
        self.limits = limits
        self.standing: dict[str, set[int]] = {}

    def update(self, hashes: Sequence[HashStatistics]) -> list[dict[str, Any]]:
        """For each hash with tables that have become alarming, what metrics.jsonl records of them.

        `hash`, `tables` (their numbers), `because` (what is beyond its limit), and of the worst of them `rows_read`,
        `entropy` and `largest_share`, with what a uniform code shows after as many reads as `uniform`.
        """
        found = []
        for one in hashes:
            reasons = alarming(one, self.limits)
            now = set(torch.stack(list(reasons.values())).any(0).nonzero().flatten().tolist())
            new = sorted(now - self.standing.get(one.name, set()))
            self.standing[one.name] = now
            if new:
                found.append(_describe(one, new, reasons))
        return found


def alarming(one: HashStatistics, limits: LoggingConfig) -> dict[str, Tensor]:
    """bool [K] by reason: whether each table is beyond that limit."""
    numbers = one.numbers
    expected = uniform_code(int(numbers[0, READS]), 2**one.bits)
    enough = numbers[:, READS] >= LEAST_READS
    hottest = expected.largest_share + limits.alarm_largest_share * (1 - expected.largest_share)
    return {
        "rows_read": enough & (numbers[:, ROWS_READ] < limits.alarm_rows_read * expected.rows_read),
        "entropy": enough & (numbers[:, ENTROPY] < limits.alarm_entropy * expected.entropy),
        "largest_share": enough & (numbers[:, LARGEST] > hottest),
    }


def _describe(one: HashStatistics, tables: list[int], reasons: dict[str, Tensor]) -> dict[str, Any]:
    numbers = one.numbers[tables]
    expected = uniform_code(int(one.numbers[0, READS]), 2**one.bits)
    return {
        "hash": one.name,
        "tables": tables,
        "because": [name for name, beyond in reasons.items() if beyond[tables].any()],
        "rows_read": numbers[:, ROWS_READ].min().item(),
        "entropy": numbers[:, ENTROPY].min().item(),
        "largest_share": numbers[:, LARGEST].max().item(),
        "uniform": asdict(expected),
    }


def alarm_lines(step: int, alarms: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line on each of `Alarms.update`'s for the console."""
    for alarm in alarms:
        tables = alarm["tables"]
        more = f" and {len(tables) - _SHOWN} more" if len(tables) > _SHOWN else ""
        named = ", ".join(map(str, tables[:_SHOWN])) + more
        figures = ", ".join(
            f"{name.replace('_', ' ')} {alarm[name]:.3f} (uniform {alarm['uniform'][name]:.3f})"
            for name in alarm["because"]
        )
        yield (
            f"warning: step {step}: {describe_hash(alarm['hash'])}: table{'s' * (len(tables) > 1)} {named}: few rows "
            f"take most reads: {figures}; {_REMEDY}"
        )


def describe_hash(name: str) -> str:
    """`blocks.3.hash_ffn` -> `layer 3 ffn_up`."""
    *_, layer, hash_ = name.split(".")
    return f"layer {layer} {_HASHES.get(hash_, hash_)}"
