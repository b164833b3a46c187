"""How far the fetching of images is, summed up for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dure.v1.endpoint_pb2 import ImageLayer, ImagePull, Kernel, Replica
from dure.wire.quantities import human_bytes

# In the words of engines: what a layer is before its bytes are there, and when nothing is left to do for it.
_BEFORE = ("pulling fs layer", "waiting", "retrying", "queued")
_FETCHING = "downloading"
_DONE = ("pull complete", "already exists")
_THERE = "already exists"


@dataclass(frozen=True)
class Progress:
    """Layers that are done of all, and bytes that are here of all; `more` says that some layers have not said
    their size yet, so that the total is too small. `unpacking`: all bytes are here, not all layers done."""

    layers: int
    done: int
    here_bytes: int
    total_bytes: int
    more: bool
    unpacking: bool


@dataclass(frozen=True)
class Fetch:
    """A node fetches an image, for so many kernels."""

    node: str
    pull: ImagePull
    kernels: int


def progress(layers: Iterable[ImageLayer]) -> Progress:
    """The sum of layers. Bytes are counted as they come from the registry: what is being unpacked is here."""
    count = done = here = total = 0
    more, fetching = False, False
    for layer in layers:
        count += 1
        done += is_done(layer)
        size = max(layer.total_bytes, 0)
        if _is(layer, *_BEFORE):
            fetching, more = True, more or not size
        elif _is(layer, _FETCHING):
            fetching, more = True, more or not size
            got = max(layer.current_bytes, 0)
            here += min(got, size) if size else got
            size = size or got
        elif not _is(layer, _THERE):
            # Of a layer that is here an engine may name no size; then nobody counts it.
            here += size
        else:
            size = 0
        total += size
    return Progress(count, done, here, total, more, bool(count) and not fetching and done < count)


def sentence(pull: ImagePull) -> str:
    """`pulling IMAGE: 3 of 7 layers, 120 of 800 MiB`; a `+` says that the total will grow."""
    found = progress(pull.layers)
    if not found.layers:
        return f"pulling {pull.image}"
    text = f"pulling {pull.image}: {found.done} of {found.layers} layers"
    if found.total_bytes:
        text += f", {amount_of(found.here_bytes, found.total_bytes, more=found.more)}"
    return text + (", unpacking" if found.unpacking else "")


def fetches(kernels: Iterable[Kernel]) -> list[Fetch]:
    """What nodes fetch, by node: kernels of one node that wait for one image share its pull, of which the
    newest report counts."""
    found: dict[tuple[str, str], list[ImagePull]] = {}
    for kernel in kernels:
        if kernel.HasField("pull"):
            found.setdefault((kernel.node.rsplit("/", 1)[-1], kernel.pull.image), []).append(kernel.pull)
    return [Fetch(node, max(pulls, key=_far), len(pulls)) for (node, _), pulls in sorted(found.items())]


def kernels_of(replicas: Iterable[Replica]) -> list[Kernel]:
    return [kernel for replica in replicas for kernel in replica.kernels]


def shown_layers(layers: Sequence[ImageLayer], most: int) -> tuple[list[ImageLayer], str]:
    """Layers for `most` lines: all of them, or those that something happens to and a last line that sums up
    the others (`and 9 more: 5 Pull complete, 4 Waiting`)."""
    if len(layers) <= most:
        return list(layers), ""
    busy = [layer for layer in layers if not is_done(layer) and not _is(layer, *_BEFORE)]
    shown = busy[: max(most - 1, 0)]
    counts: dict[str, int] = {}
    for layer in layers:
        if not any(layer is each for each in shown):
            counts[layer.status] = counts.get(layer.status, 0) + 1
    others = ", ".join(f"{count} {status}" for status, count in counts.items())
    more = "and " if shown else ""
    return shown, f"{more}{len(layers) - len(shown)} {'more' if shown else 'layers'}: {others}"


def amount_of(here_bytes: int, total_bytes: int, *, more: bool = False) -> str:
    """`120 of 800 MiB`, in the unit of the total."""
    total, unit = human_bytes(total_bytes).split(" ")
    factor = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    here = f"{here_bytes / factor:.1f}".removesuffix(".0")
    return f"{here} of {total}{'+' if more else ''} {unit}"


def is_done(layer: ImageLayer) -> bool:
    return _is(layer, *_DONE)


def _is(layer: ImageLayer, *words: str) -> bool:
    return layer.status.lower().startswith(words)


def _far(pull: ImagePull) -> tuple[int, int]:
    found = progress(pull.layers)
    return found.done, found.here_bytes
