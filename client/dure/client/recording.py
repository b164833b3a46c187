"""What `dure rule record` keeps: metrics as they come, as a file for `dure rule simulate`. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml

from dure.client.rule_notation import rule_values, source_text
from dure.v1.scaling_pb2 import EndpointMeasurements, Metric, ScalingRule

SERIES_MAX = 500
# What proxies see is per replica in rules; a total can be replayed with other rules, too.
_TOTALS = ("requests_per_second", "concurrency", "queue")
# Older than this a value is not measured any more.
STALE_S = 15.0


class Recording:
    """Series of one endpoint; of what does not change only the first value is kept."""

    def __init__(self, wanted: Collection[str] | None = None) -> None:
        """`wanted` None keeps everything; else metrics by SOURCE/METRIC or by METRIC."""
        self._wanted = wanted
        self._points: dict[str, list[tuple[float, float | None]]] = {}
        self.left_out = 0

    @property
    def series(self) -> Mapping[str, Sequence[tuple[float, float | None]]]:
        return self._points

    def add(self, second: float, metrics: Iterable[Metric], totals: EndpointMeasurements) -> None:
        """What is measured now; nothing, while nothing can be asked."""
        values = dict(self._values(metrics, totals))
        for name in self._points.keys() - values.keys():
            self._put(name, second, None)
        for name, value in values.items():
            self._put(name, second, value)

    def text(
        self, rules: Iterable[ScalingRule], replicas: int, seconds: float, scale_to_zero_s: float
    ) -> str:
        """The file."""
        values: dict[str, Any] = {
            "rules": [rule_values(rule) for rule in rules],
            "replicas": replicas,
            "seconds": max(math.ceil(seconds), 1),
        }
        if scale_to_zero_s:
            values["scale_to_zero_after"] = f"{scale_to_zero_s:g}s"
        text = str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        lines = ["series:" if self._points else "series: {}"]
        for name in sorted(self._points):
            lines.append(f"  {yaml.safe_dump(name, width=10_000).splitlines()[0]}:")
            if name.removeprefix("proxy/") in _TOTALS:
                lines.append("    shared: true")
            lines.append("    points: |")
            lines += [f"      {second:g},{_text(value)}" for second, value in self._points[name]]
        return text + "\n".join(lines) + "\n"

    def _values(self, metrics: Iterable[Metric], totals: EndpointMeasurements) -> Iterable[tuple[str, float]]:
        for metric in metrics:
            name = f"{source_text(metric.source)}/{metric.name}"
            if self._wanted is not None and not {name, metric.name} & set(self._wanted):
                continue
            if metric.age.ToNanoseconds() <= STALE_S * 1e9 and math.isfinite(metric.value):
                total = name.removeprefix("proxy/")
                yield name, getattr(totals, total) if total in _TOTALS else metric.value

    def _put(self, name: str, second: float, value: float | None) -> None:
        points = self._points.get(name)
        if points is None:
            if len(self._points) >= SERIES_MAX:
                self.left_out += 1
                return
            points = self._points[name] = []
        if not points or points[-1][1] != value:
            points.append((second, value))


def _text(value: float | None) -> str:
    return "" if value is None else repr(round(value, 6))
