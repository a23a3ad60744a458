"""Reads of a model's tables as text: a line a hash."""

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mf_train.config import LoggingConfig
from mf_train.telemetry.alarms import alarming, describe_hash
from mf_train.telemetry.statistics import GINI, HashStatistics

_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_COLUMNS = 32


def reads_lines(
    counts: Mapping[str, Tensor], hashes: Sequence[HashStatistics], limits: LoggingConfig
) -> Iterator[str]:
    """A heading, a line a hash, and what the columns mean; `counts` [K, 2**tau] by the hash's name."""
    levels = _BLOCKS if _can_show(_BLOCKS) else _PLAIN
    head = f"{'buckets of the median table':<{_COLUMNS}}  rows read  entropy   Gini  hottest  bits  alarming"
    yield f"{'':<17} {head}"
    for one in hashes:
        table = median_table(one)
        bars = sparkline(counts[one.name][table], levels)
        numbers = one.summary()
        beyond = int(torch.stack(list(alarming(one, limits).values())).any(0).sum())
        yield (
            f"{describe_hash(one.name):<17} {bars:<{_COLUMNS}}  {numbers['rows_read']:8.1%}  {numbers['entropy']:7.3f} "
            f" {numbers['gini']:5.3f}  {numbers['largest_share']:7.1%} {numbers['bit_imbalance_worst']:5.2f}"
            f"  {beyond or '-':>3} of {len(one.numbers)}"
        )
    yield (
        f"Each bar: reads of buckets that follow each other, as high as {levels[4]} where all are read alike. Entropy: "
        "share of tau bits. Hottest: the most read bucket of any table. Bits: |share of ones - 1/2| of a table's worst "
        "bit. Means over the tables; docs/telemetry.md says when a table is alarming."
    )


def median_table(one: HashStatistics) -> int:
    """The table whose Gini coefficient is in the middle of the hash's."""
    return int(one.numbers[:, GINI].argsort(stable=True)[(len(one.numbers) - 1) // 2])


def sparkline(counts: Tensor, levels: str, columns: int = _COLUMNS) -> str:
    """Counts [2**tau] of neighbouring buckets added up in at most `columns` bars; half height is the mean."""
    bars = counts.double().view(min(columns, len(counts)), -1).mean(-1)
    mean = bars.mean().clamp(min=1e-9)
    places = (bars / mean * (len(levels) // 2)).round().clamp(max=len(levels) - 1)
    return "".join(" " if bar == 0 else levels[int(place)] for bar, place in zip(bars, places, strict=True))


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
