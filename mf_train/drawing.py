"""Pictures as PNG bytes, without matplotlib's global state; the only place that imports it."""

import io
from typing import Any

_DPI = 110


def make_figure(
    columns: int = 1, size: tuple[float, float] = (6.4, 4.2), rows: int = 1
) -> tuple[Any, list[Any]]:
    """A figure and its axes side by side, row after row, each of `size` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def shade(share: float) -> Any:
    """A colour for a place between 0 and 1 in an ordered row of curves."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)


def make_png(figure: Any) -> bytes:
    """The figure's picture."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()
