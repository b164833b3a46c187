"""Plots of series in a terminal: columns of blocks over time. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_GUTTER = 9


def plot(
    title: str,
    values: Sequence[float | None],
    *,
    width: int,
    height: int = 6,
    marks: Sequence[float] = (),
    seconds: int | None = None,
) -> list[str]:
    """A title, `height` rows and with `seconds` an axis; a column is the highest value of its time.

    `marks` are levels to compare with, such as thresholds; None is a gap.
    """
    columns = squeeze(values, max(width - _GUTTER - 2, 10))
    finite = [value for value in columns if value is not None]
    top = max([*finite, *(mark for mark in marks if mark > 0), 0.0])
    top = top if top > 0 else 1.0
    bottom = min([*finite, 0.0])
    span = top - bottom
    inside = [mark for mark in marks if bottom <= mark <= top]
    marked = {min(height - 1, int((mark - bottom) / span * height)) for mark in inside}
    rows = [title]
    for level in reversed(range(height)):
        cells = "".join(_cell(value, bottom, span, level, height, level in marked) for value in columns)
        label = _label(top) if level == height - 1 else _label(bottom) if level == 0 else ""
        rows.append(f"{label:>{_GUTTER}} │{cells}".rstrip())
    if seconds is not None:
        rows.append(f"{'':>{_GUTTER}} └{'─' * len(columns)}")
        end = f"{seconds} s"
        rows.append(f"{'':>{_GUTTER}}  0{end:>{max(len(columns) - 1, len(end) + 1)}}")
    return rows


def squeeze(values: Sequence[float | None], width: int) -> list[float | None]:
    """At most `width` values, each the highest of those that it stands for; short series are drawn out."""
    count = len(values)
    if not count:
        return []
    result: list[float | None] = []
    for column in range(width):
        begin = column * count // width
        end = max((column + 1) * count // width, begin + 1)
        piece = [v for v in values[begin:end] if v is not None and math.isfinite(v)]
        result.append(max(piece) if piece else None)
    return result


def _cell(value: float | None, bottom: float, span: float, level: int, height: int, marked: bool) -> str:
    filled = 0 if value is None else round((value - bottom) / span * height * 8) - level * 8
    if filled <= 0:
        # What is there, however little, is seen.
        if level == 0 and value is not None and value > bottom:
            return _BLOCKS[1]
        return "·" if marked else " "
    return _BLOCKS[min(filled, 8)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
