"""What programs count, and how they show it at /metrics: the Prometheus text format, version 0.0.4.

Label sets are bounded by whoever counts: `Counter` and `Histograms` keep at most so many, and count the rest
under one with every label `other`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL_SETS_MAX = 1_000
# From half a millisecond (a transaction) to minutes (a model that is fetched).
SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)

Labels = Mapping[str, str]


@dataclass(slots=True)
class Histogram:
    """Counts of values up to each bound, and above the last."""

    bounds: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Counter:
    """Counts by the values of its labels, in the order of `names`."""

    names: tuple[str, ...]
    counts: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add(self, *values: str, amount: float = 1) -> None:
        key = _bounded(values, self.counts)
        self.counts[key] = self.counts.get(key, 0) + amount


@dataclass(slots=True)
class Histograms:
    """Histograms by the values of their labels, in the order of `names`."""

    names: tuple[str, ...]
    bounds: tuple[float, ...] = SECONDS
    found: dict[tuple[str, ...], Histogram] = field(default_factory=dict)

    def observe(self, value: float, *values: str) -> None:
        key = _bounded(values, self.found)
        if key not in self.found:
            self.found[key] = Histogram(self.bounds)
        self.found[key].observe(value)


class Page:
    """Collects families, each once, and renders them in that order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, value: float) -> None:
        self.gauges(name, text, [({}, value)])

    def gauges(self, name: str, text: str, values: Iterable[tuple[Labels, float]]) -> None:
        self._head(name, "gauge", text)
        self._lines += [f"{name}{_labels(labels)} {number(value)}" for labels, value in values]

    def total(self, name: str, text: str, value: float) -> None:
        """A counter without labels."""
        self._head(name, "counter", text)
        self._lines.append(f"{name} {number(value)}")

    def counter(self, name: str, text: str, counter: Counter) -> None:
        self._head(name, "counter", text)
        for values, count in counter.counts.items():
            labels = dict(zip(counter.names, values, strict=True))
            self._lines.append(f"{name}{_labels(labels)} {number(count)}")

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        self._head(name, "histogram", text)
        self._buckets(name, {}, histogram)

    def histograms(self, name: str, text: str, histograms: Histograms) -> None:
        self._head(name, "histogram", text)
        for values, histogram in histograms.found.items():
            self._buckets(name, dict(zip(histograms.names, values, strict=True)), histogram)

    def render(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP {name} {text}.", f"# TYPE {name} {kind}"]

    def _buckets(self, name: str, labels: Labels, histogram: Histogram) -> None:
        below = 0
        for bound, count in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
            below += count
            self._lines.append(f"{name}_bucket{_labels({**labels, 'le': number(bound)})} {below}")
        self._lines.append(f"{name}_sum{_labels(labels)} {number(round(histogram.total, 6))}")
        self._lines.append(f"{name}_count{_labels(labels)} {below}")


def number(value: float) -> str:
    """As Prometheus reads it: whole numbers without a point, no digit lost."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def _bounded(values: Sequence[str], known: Mapping[tuple[str, ...], object]) -> tuple[str, ...]:
    key = tuple(values)
    return key if key in known or len(known) < LABEL_SETS_MAX else ("other",) * len(key)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
