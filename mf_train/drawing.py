"""Pictures as PNG bytes, and pages that hold them. The only place that imports matplotlib, without its global state."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
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


def scale_loss(axes: Any) -> None:
    """A logarithmic scale upwards, with plain numbers at round places: losses rarely span a decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.yaxis.set_minor_locator(NullLocator())


def make_png(figure: Any) -> bytes:
    """The figure's picture."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()


def render_page(
    template: Path,
    pictures: Mapping[str, bytes],
    filters: Mapping[str, Callable[..., Any]] = {},
    **values: Any,
) -> str:
    """An HTML page from a jinja2 template, to which `pictures` (PNG by title) come as URLs of their own data.

    Nothing in the page is fetched from elsewhere.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters.update(filters)
    urls = {
        title: f"data:image/png;base64,{base64.b64encode(data).decode()}" for title, data in pictures.items()
    }
    return environment.from_string(template.read_text(encoding="utf-8")).render(pictures=urls, **values)
