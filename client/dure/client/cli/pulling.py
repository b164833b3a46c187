"""Images that nodes fetch: a bar for each layer on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence

import click

from dure.client.cli.text import clean
from dure.client.pulls import Fetch, amount_of, fetches, sentence, shown_layers
from dure.v1.endpoint_pb2 import ImageLayer, Kernel
from dure.wire.quantities import human_bytes

LAYERS_MAX = 8
# Nodes that are shown each by itself.
FETCHES_MAX = 4
# A line of text for each image no more often than this.
EVERY_S = 5.0
_BAR = 24


def lines(kernels: Iterable[Kernel], *, room: int, color: bool) -> list[str]:
    """Each image on each node, and its layers, on about `room` lines."""
    found = fetches(kernels)
    shown = found[:FETCHES_MAX]
    most = min(LAYERS_MAX, max(1, room // max(len(shown), 1) - 1))
    result = []
    for fetch in shown:
        result.append(_heading(fetch))
        layers, others = shown_layers(fetch.pull.layers, most)
        result += [f"  {_layer(layer, color=color)}" for layer in layers]
        result += [f"  {clean(others)}"] if others else []
    return result + _rest(found)


def rows(used: int) -> int:
    """Lines that are left on the terminal below those that are used."""
    return max(shutil.get_terminal_size().lines - used - 2, 0)


class Ticker:
    """Lines that say how far images are, each image at most every five seconds."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, str]] = {}

    def due(self, kernels: Iterable[Kernel], now_s: float) -> list[str]:
        found = fetches(kernels)
        due = []
        texts = {f"{fetch.node} {fetch.pull.image}": _heading(fetch) for fetch in found[:FETCHES_MAX]}
        texts.update(("", text) for text in _rest(found))
        for key, text in texts.items():
            at_s, before = self._told.get(key, (now_s - EVERY_S, ""))
            if now_s - at_s >= EVERY_S and text != before:
                self._told[key] = (now_s, text)
                due.append(text)
        for key in self._told.keys() - texts.keys():
            del self._told[key]
        return due


def _heading(fetch: Fetch) -> str:
    several = f" ({fetch.kernels} sessions wait for it)" if fetch.kernels > 1 else ""
    return clean(f"{fetch.node}: {sentence(fetch.pull)}{several}")


def _rest(found: Sequence[Fetch]) -> list[str]:
    more = len(found) - FETCHES_MAX
    return [f"and {more} image{'s' if more > 1 else ''} more on other nodes"] if more > 0 else []


def _layer(layer: ImageLayer, *, color: bool) -> str:
    text = f"{clean(layer.id)[:12]:12}  {clean(layer.status)[:20]:18}"
    moving = layer.status.lower().startswith(("downloading", "extracting"))
    if not moving or not layer.current_bytes:
        return text.rstrip()
    if layer.total_bytes <= 0:
        return f"{text}  {human_bytes(max(layer.current_bytes, 0))}"
    here = min(max(layer.current_bytes, 0), layer.total_bytes)
    full = _BAR * here // layer.total_bytes
    bar = "#" * full
    bar = (click.style(bar, fg="green") if color else bar) + "." * (_BAR - full)
    return f"{text}  [{bar}] {amount_of(here, layer.total_bytes)}"
