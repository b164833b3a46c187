"""Plain text for people: aligned columns, ages, moments. Pure: the clock is passed in."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dure.wire.quantities import parse_duration_s

GAP = "  "


def clean(text: str) -> str:
    """One line without control characters: what a model printed must not steer the terminal."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())


def cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def align(
    header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None
) -> list[list[str]]:
    """Header and rows padded to equal widths (at least `widths`), all but the last column; empty is `-`."""
    lines = [list(header), *([clean(cell) or "-" for cell in row] for row in rows)]
    least = list(widths or []) + [0] * len(header)
    needed = [max(least[i], *(cells(line[i]) for line in lines)) for i in range(len(header))]
    return [
        [
            cell + " " * (needed[i] - cells(cell)) if i < len(header) - 1 else cell
            for i, cell in enumerate(line)
        ]
        for line in lines
    ]


def cut(text: str, width: int) -> str:
    """At most `width` columns of a text, with `...` where it goes on."""
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for c in text:
        used += cells(c)
        if used > max(width - 3, 0):
            break
        kept.append(c)
    return "".join(kept) + "..."[: max(width, 0)]


def age(created: Timestamp, now: datetime) -> str:
    """`45s`, `12m`, `3h`, `5d` since a moment; empty if it is not set."""
    if not created.seconds:
        return ""
    return span((now - created.ToDatetime(tzinfo=UTC)).total_seconds())


def span(seconds: float) -> str:
    """The largest unit that makes the number readable."""
    whole = max(int(seconds), 0)
    for unit, size, until in (("s", 1, 120), ("m", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if whole < until:
            return f"{whole // size}{unit}"
    return f"{whole // 86400}d"


def duration_span(duration: Duration) -> str:
    return span(duration.ToNanoseconds() / 1e9)


def moment(stamp: Timestamp) -> str:
    """`2026-01-31 12:00:00Z`; empty if it is not set."""
    if not stamp.seconds:
        return ""
    return stamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def figure(value: float) -> str:
    """Three digits: `0`, `0.25`, `12.3`, `1,234`."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")


def milliseconds(value: float) -> str:
    """`35ms`, `1.2s`; empty before the first request."""
    if value <= 0:
        return ""
    return f"{value / 1000:.3g}s" if value >= 1000 else f"{value:.3g}ms"


def parse_expiry(text: str) -> timedelta | datetime:
    """How long (`1h`, `7d`) or until when (`2026-12-31T00:00:00Z`). Raises ValueError with a sentence."""
    try:
        return timedelta(seconds=parse_duration_s(text))
    except OverflowError as error:
        raise ValueError(f"`{text[:40]}` is too long") from error
    except ValueError:
        pass
    try:
        until = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"`{text[:40]}` is neither a duration such as 1h or 7d nor a moment such as 2026-12-31T00:00:00Z"
        ) from error
    if until.tzinfo is None:
        moment = until.isoformat(timespec="seconds")
        raise ValueError(f"`{text[:40]}` has no time zone: write {moment}Z, or +09:00 at its end")
    return until.astimezone(UTC)
