"""A page of Prometheus text, read strictly: every family announced once, every histogram whole."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import aiohttp

_LINE = re.compile(r"([a-z_][a-z0-9_]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,|$)')
Series = dict[tuple[tuple[str, str], ...], float]


def parse(text: str) -> dict[str, Series]:
    """Values by family (or the name of a histogram's part) and labels. Raises AssertionError."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    found: dict[str, Series] = {}
    newest = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            newest = line.split()[2]
            assert newest not in kinds, f"{newest} comes twice"
            assert len(line.split()) > 3
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == newest and kind in ("gauge", "counter", "histogram")
            assert (kind == "counter") == name.endswith("_total"), name
            kinds[name] = kind
        else:
            match = _LINE.fullmatch(line)
            assert match is not None, line
            name, inside = match[1], match[2] or ""
            labels = _LABEL.findall(inside)
            assert _LABEL.sub("", inside) == "", line
            family = re.sub(r"_(bucket|sum|count)$", "", name) if kinds[newest] == "histogram" else name
            assert family == newest, line
            series = found.setdefault(name, {})
            assert tuple(labels) not in series, f"twice: {line}"
            series[tuple(labels)] = float(match[3])
    for name, kind in kinds.items():
        if kind == "histogram":
            _check_histogram(name, found)
    return found


def _check_histogram(name: str, found: dict[str, Series]) -> None:
    for labels, count in found.get(f"{name}_count", {}).items():
        buckets = [
            (float(dict(own)["le"]), value)
            for own, value in found[f"{name}_bucket"].items()
            if tuple(label for label in own if label[0] != "le") == labels
        ]
        assert [bound for bound, _ in buckets] == sorted(bound for bound, _ in buckets)
        assert buckets[-1] == (math.inf, count)
        assert all(low[1] <= high[1] for low, high in itertools.pairwise(buckets))
        assert labels in found[f"{name}_sum"]


def value(page: dict[str, Series], name: str, **labels: str) -> float:
    """The one value with these labels, among others."""
    wanted = set(labels.items())
    matching = [number for own, number in page.get(name, {}).items() if wanted <= set(own)]
    assert len(matching) == 1, f"{name}{labels}: {matching}"
    return matching[0]


async def read(port: int) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse(await response.text())
