"""Reads metrics pages: Prometheus text 0.0.4 and OpenMetrics, in pieces, summed over labels.

It is strict about what a sample is and tolerant about the page: a line that is none is skipped and counted,
and so is a value that is no finite number. What becomes of a family depends on its type:

    gauge, untyped      a gauge
    counter             a counter, under the name of its samples (`_total` or not)
    histogram           a histogram of its buckets; `_sum` and `_count` as counters
    summary             `_sum` and `_count` as counters; its quantiles cannot be added up
    info, stateset, gaugehistogram    nothing
    `_created` of any of them         nothing
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

PAGE_BYTES_MAX = 2 * 1024 * 1024
SAMPLES_MAX = 20_000
FAMILIES_MAX = 500
HISTOGRAMS_MAX = 100
BUCKETS_MAX = 64
_NAME_LENGTH_MAX = 200
_LINE_BYTES_MAX = 16 * 1024
SERIES_REMEMBERED_MAX = 20_000
_REMEMBERED_BYTES_MAX = 500
# Metrics of inference frameworks: what rules are mostly made of.
KNOWN_PREFIXES = ("vllm:", "llamacpp:", "sglang:", "tgi_")

# Possessive throughout: a line that does not match is given up in one pass.
_SAMPLE = re.compile(
    r"""([a-zA-Z_:][a-zA-Z0-9_:]*+)[ \t]*+"""
    r"""(\{(?:[ \t]*+[a-zA-Z_][a-zA-Z0-9_]*+[ \t]*+=[ \t]*+"(?:[^"\\]++|\\.)*+"[ \t]*+(?:,|(?=\})))*+"""
    r"""[ \t]*+\})?+[ \t]*+"""
    r"""([-+.0-9a-zA-Z]++)"""
    r"""(?:[ \t]++-?[0-9]++(?:\.[0-9]*+)?+(?:[eE][-+]?[0-9]++)?+)?+[ \t]*+(?:\#[ ].*)?+"""
)
_LABEL = re.compile(
    r"""[ \t]*+([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*+=[ \t]*+"((?:[^"\\]++|\\.)*+)"[ \t]*+(?:,|$)"""
)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NUMBER_BYTES = re.compile(_NUMBER.pattern.encode())
_TYPE = re.compile(r"#[ \t]+TYPE[ \t]+([a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]+([a-z]+)[ \t]*")
_GAUGES = frozenset(("gauge", "untyped", "unknown"))
_SUMMED = frozenset(("histogram", "summary"))
_DROPPED = frozenset(("info", "stateset", "gaugehistogram"))
_TYPES = _GAUGES | _SUMMED | _DROPPED | {"counter"}


class PageRefused(Exception):
    """A page that is not worth reading on. The message says why."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """A cumulative histogram: upper bounds, the last infinite, and the observations up to each."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Metrics:
    """What a page shows, by name; `broken` is how many lines were none."""

    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Buckets] = field(default_factory=dict)
    samples: int = 0
    broken: int = 0


@dataclass(slots=True)
class Memory:
    """What the text before a value says: the name, and the upper bound if it is a bucket.

    The same series come again with every look, and from every replica; reading them costs most of the time.
    It is the same whatever stands on the rest of the page.
    """

    series: dict[bytes, tuple[str, float | None]] = field(default_factory=dict)

    def add(self, text: bytes, name: str, bound: float | None) -> None:
        if len(text) > _REMEMBERED_BYTES_MAX:
            return
        if len(self.series) >= SERIES_REMEMBERED_MAX:
            self.series.clear()
        self.series[text] = (name, bound)


class Reader:
    """Reads one page. `feed` its bytes as they come, then `end`; both raise PageRefused."""

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = memory if memory is not None else Memory()
        self._rest = b""
        self._size_bytes = 0
        self._types: dict[str, str] = {}
        self._gauges: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._buckets: dict[str, dict[float, float]] = {}
        self._samples = 0
        self._broken = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._size_bytes > PAGE_BYTES_MAX:
            raise PageRefused(f"the page is larger than {PAGE_BYTES_MAX} bytes")
        *lines, self._rest = (self._rest + data).split(b"\n")
        # Of a line that never ends, no more is kept than shows that it is too long.
        self._rest = self._rest[: _LINE_BYTES_MAX + 1]
        for line in lines:
            self._line(line)

    def end(self) -> Metrics:
        """What the page shows. A last line without an end counts: some exporters leave it out."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        if self._broken and not self._samples:
            raise PageRefused("no line of the page is a metric")
        return self._summed_up()

    def _line(self, raw: bytes) -> None:
        if self._ended or raw[:7] == b"# HELP ":
            return
        before, _, last = raw.rpartition(b" ")
        known = self._memory.series.get(before)
        if known is not None and _NUMBER_BYTES.fullmatch(last):
            self._count()
            if math.isfinite(number := float(last)):
                self._sample(known[0], known[1], number)
            return
        if len(raw) > _LINE_BYTES_MAX:
            self._broken += 1
            return
        try:
            line = raw.decode("utf-8").strip(" \t\r")
        except UnicodeDecodeError:
            self._broken += 1
            return
        if not line:
            return
        if line[0] == "#":
            self._comment(line)
            return
        match = _SAMPLE.fullmatch(line)
        if match is None:
            self._broken += 1
            return
        self._count()
        name, labels, text = match.groups()
        if len(name) > _NAME_LENGTH_MAX:
            return
        value = _number(text)
        if value is None:
            self._broken += 1
            return
        bound = _bound(labels) if name.endswith("_bucket") else None
        # Only where the value is the last thing on the line: a time would be taken for one.
        if last == text.encode() and match.end(3) == len(line):
            self._memory.add(before, name, bound)
        if math.isfinite(value):
            self._sample(name, bound, value)

    def _count(self) -> None:
        self._samples += 1
        if self._samples > SAMPLES_MAX:
            raise PageRefused(f"the page has more than {SAMPLES_MAX} samples")

    def _comment(self, line: str) -> None:
        if line == "# EOF":
            self._ended = True
            return
        match = _TYPE.fullmatch(line)
        # Types are kept for as many families as there can be samples: a page of types alone is no page.
        if match is not None and match[2] in _TYPES and len(self._types) < SAMPLES_MAX:
            self._types[match[1]] = match[2]

    def _sample(self, name: str, bound: float | None, value: float) -> None:
        kind = self._types.get(name)
        if name.endswith("_created") and self._belongs(name.removesuffix("_created")):
            return
        if kind == "counter":
            _add(self._counters, name, value)
        elif kind in _GAUGES:
            _add(self._gauges, name, value)
        elif kind is None:
            self._part(name, bound, value)

    def _part(self, name: str, bound: float | None, value: float) -> None:
        """A sample whose name is not that of its family, or of no type."""
        base, _, suffix = name.rpartition("_")
        kind = self._types.get(base) if base else None
        if (kind == "counter" and suffix == "total") or (kind in _SUMMED and suffix in ("sum", "count")):
            _add(self._counters, name, value)
        elif kind == "histogram" and suffix == "bucket":
            if bound is None:
                self._broken += 1
            else:
                buckets = self._buckets.setdefault(base, {})
                buckets[bound] = buckets.get(bound, 0.0) + value
        elif kind not in _DROPPED:
            _add(self._gauges, name, value)

    def _belongs(self, base: str) -> bool:
        """Whether a family of that name counts something, so that there is a time of its creation."""
        kinds = (self._types.get(base), self._types.get(base + "_total"))
        return any(kind == "counter" or kind in _SUMMED for kind in kinds)

    def _summed_up(self) -> Metrics:
        histograms = {
            name: made for name, buckets in self._buckets.items() if (made := _histogram(buckets)) is not None
        }
        kept = set(_preferred(histograms, HISTOGRAMS_MAX))
        left = FAMILIES_MAX - len(kept)
        plain = set(_preferred([*self._gauges, *self._counters], left))
        return Metrics(
            {name: value for name, value in self._gauges.items() if name in plain and math.isfinite(value)},
            {name: value for name, value in self._counters.items() if name in plain and math.isfinite(value)},
            {name: made for name, made in histograms.items() if name in kept},
            self._samples,
            self._broken,
        )


def read(page: bytes) -> Metrics:
    """A whole page. Raises PageRefused."""
    reader = Reader()
    reader.feed(page)
    return reader.end()


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def _preferred(names: Iterable[str], count_max: int) -> list[str]:
    return sorted(names, key=lambda name: (not name.startswith(KNOWN_PREFIXES), name))[:count_max]


def _number(text: str) -> float | None:
    """A value as both formats write it, NaN and infinities too; None if it is none."""
    if _NUMBER.fullmatch(text):
        return float(text)
    if text.lstrip("+-").lower() in ("inf", "infinity", "nan"):
        return float(text)
    return None


def _bound(labels: str | None) -> float | None:
    """The upper bound of a bucket, from its label `le`."""
    if labels is None:
        return None
    inside, position = labels[1:-1], 0
    while (match := _LABEL.match(inside, position)) is not None:
        if match[1] == "le":
            value = _number(match[2])
            return value if value is not None and not math.isnan(value) else None
        position = match.end()
    return None


def _histogram(buckets: dict[float, float]) -> Buckets | None:
    """The sum of all label sets; None if it is none: no infinite bucket, or counts that fall."""
    bounds = sorted(buckets)
    if bounds[-1] != math.inf:
        return None
    counts = [buckets[bound] for bound in bounds]
    if (
        counts[0] < 0
        or not math.isfinite(counts[-1])
        or any(after < before for before, after in pairwise(counts))
    ):
        return None
    if len(bounds) > BUCKETS_MAX:
        # Cumulative counts stay true when bounds between them are left out.
        step = -(-len(bounds) // BUCKETS_MAX)
        positions = range(len(bounds) - 1, -1, -step)[::-1]
        bounds, counts = [bounds[p] for p in positions], [counts[p] for p in positions]
    return Buckets(tuple(bounds), tuple(counts))
