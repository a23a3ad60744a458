"""The paper's Figure 4: how often each bucket is read, for the tables of some layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mf_train.drawing import make_figure, make_png
from mf_train.inspection.terminal import median_table
from mf_train.telemetry.alarms import describe_hash
from mf_train.telemetry.statistics import HashStatistics

_HASHES = 3  # of a layer
_TALLEST = 8.0  # times the mean: where a picture's bars are cut off


def draw_reads(all_counts: Mapping[str, Tensor], hashes: Sequence[HashStatistics]) -> bytes:
    """PNG: the first, middle and last layer, a row each, and a column a hash; counts [K, 2**tau] by the hash's name.

    Bars: reads of each bucket of the table with the median Gini coefficient, over the mean; line: all tables' buckets
    from the most read one on, their median.
    """
    layers = len(hashes) // _HASHES
    shown = sorted({0, layers // 2, layers - 1})
    figure, axes = make_figure(_HASHES, (3.0, 1.9), len(shown))
    for place, panel in enumerate(axes):
        one = hashes[shown[place // _HASHES] * _HASHES + place % _HASHES]
        counts = all_counts[one.name].double()
        relative = counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)
        bars = relative[median_table(one)]
        ranked = relative.sort(-1, descending=True).values.median(0).values
        panel.fill_between(range(len(bars)), bars.tolist(), step="mid", color="C0", linewidth=0)
        panel.plot(ranked.tolist(), color="C1", linewidth=1.2)
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
        numbers = one.summary()
        panel.set_title(
            f"{describe_hash(one.name)}: entropy {numbers['entropy']:.2f}, Gini {numbers['gini']:.2f}",
            fontsize=9,
        )
        panel.set_xlim(0, len(bars) - 1)
        panel.set_ylim(0, max(3.0, min(_TALLEST, 1.1 * bars.max().item())))
        if bars.max() > _TALLEST:
            note = f"up to {bars.max():.0f}"
            panel.text(0.98, 0.96, note, transform=panel.transAxes, ha="right", va="top", fontsize=8)
        panel.tick_params(labelsize=8)
        if place % _HASHES == 0:
            panel.set_ylabel("reads / mean of a bucket", fontsize=8)
        if place >= len(axes) - _HASHES:
            panel.set_xlabel("bucket (line: sorted by reads)", fontsize=8)
    return make_png(figure)
