"""From what the worker tells of GPUs to devices, and to which of those known before are lost.

A GPU that falls off the bus often loses its UUID too; it is then known by its place in the driver's list.
One that is not listed any more counts as lost when it is missing for the second time: a driver that was just
asked anew may not have found them all. A driver that does not answer at all loses nobody: what runs may be
well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dure.agent.accelerators import SHARES_PER_DEVICE_MILLI, Found, device
from dure.fleet.v1 import fleet_pb2

NAME = "cuda"
MISSING_MAX = 1
# Of those that are not listed any more: parts of GPUs get new ids whenever they are made anew.
GONE_MAX = 64
# Place of a GPU that is known from an agent before.
NO_INDEX = -1
# Requests for shares are multiples of this; what a part has beyond could be given to nobody.
SHARES_STEP_MILLI = 10


@dataclass(frozen=True)
class Known:
    """A device as it was when it answered, its GPU's place in the list, and for how many looks it is
    missing."""

    device: fleet_pb2.Device
    index: int
    missing: int = 0


@dataclass(frozen=True)
class Look:
    """What is known after a look, and what the agent is told of it."""

    known: Mapping[str, Known] = field(default_factory=dict)
    found: Found = field(default_factory=Found)


def look(answer: Mapping[str, Any], before: Mapping[str, Known]) -> Look:
    """`answer` is the worker's to `devices`, or has but an `error`."""
    gpus = answer["gpus"]
    broken = [gpu for gpu in gpus if gpu["error"]]
    known: dict[str, Known] = {}
    memory: dict[str, Mapping[int, int]] = {}
    mps: dict[str, frozenset[int]] = {}
    for gpu in gpus:
        if gpu["error"]:
            continue
        for offered, made in _offered(gpu):
            known[made.id] = Known(made, gpu["index"])
            if offered["memory"] is not None:
                memory[made.id] = {int(pid): used for pid, used in offered["memory"].items()}
                mps[made.id] = frozenset(offered["mps"])
    shown = {uid: one.device for uid, one in known.items()}
    lost: set[str] = set()
    for uid, was in before.items():
        if uid in known:
            continue
        failed = next((gpu for gpu in broken if _is(gpu, was)), None)
        listed = bool(answer["error"]) or failed is not None
        known[uid] = now = replace(was, missing=0 if listed else was.missing + 1)
        sick = shown[uid] = fleet_pb2.Device()
        sick.CopyFrom(was.device)
        sick.healthy = False
        if failed is not None:
            sick.detail = f"the driver does not answer for it: {failed['error']}"
            lost |= {uid} if failed["lost"] else set()
        elif answer["error"]:
            sick.detail = f"the driver does not answer: {answer['error']}"
        else:
            sick.detail = "the driver does not list it any more"
            lost |= {uid} if now.missing > MISSING_MAX else set()
    for uid in sorted((uid for uid in known if known[uid].missing), key=lambda uid: known[uid].missing)[
        GONE_MAX:
    ]:
        del known[uid], shown[uid]
    places = {one.index for one in before.values()}
    limitations = [
        f"GPU {gpu['index']} cannot be used: {gpu['error']}" for gpu in broken if gpu["index"] not in places
    ]
    if answer["error"] and not before:
        limitations.append(f"no GPUs are offered: {answer['error']}")
    ordered = sorted(known, key=lambda uid: (known[uid].index, uid))
    return Look(
        known,
        Found(
            tuple(shown[uid] for uid in ordered),
            tuple(limitations),
            frozenset(lost & known.keys()),
            memory,
            mps,
        ),
    )


def _is(gpu: Mapping[str, Any], was: Known) -> bool:
    """Whether a GPU that does not answer is one of those known, or what that one is a part of."""
    if gpu["id"]:
        return gpu["id"] in (was.device.id, was.device.parent)
    return bool(gpu["index"] == was.index)


def part_shares_milli(slices: int, slices_max: int, memory_bytes: int, memory_bytes_max: int) -> int:
    """What a part of a GPU is of the whole, by its slices or by its memory, whichever is less, rounded down
    to what can be asked for."""
    exact = min(
        SHARES_PER_DEVICE_MILLI * slices // max(slices_max, 1),
        SHARES_PER_DEVICE_MILLI * memory_bytes // max(memory_bytes_max, 1),
    )
    return min(
        SHARES_PER_DEVICE_MILLI, max(SHARES_STEP_MILLI, exact // SHARES_STEP_MILLI * SHARES_STEP_MILLI)
    )


def _offered(gpu: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], fleet_pb2.Device]]:
    """What the GPU offers: itself, or its parts in MIG mode."""
    if not gpu["mig"]:
        whole = device(gpu["id"], gpu["model"], gpu["memory_bytes"], NAME)
        for peer, distance in gpu["peers"].items():
            whole.peers.add(id=peer, distance=distance)
        _set_numa_node(whole, gpu)
        return [(gpu, whole)]
    parts = []
    for part in gpu["parts"]:
        made = device(part["id"], part["model"], part["memory_bytes"], NAME)
        made.parent = gpu["id"]
        made.slots.clear()
        made.slots["cuda.shares"] = part_shares_milli(
            part["slices"], gpu["slices_max"], part["memory_bytes"], gpu["memory_bytes"]
        )
        _set_numa_node(made, gpu)
        parts.append((part, made))
    return parts


def _set_numa_node(made: fleet_pb2.Device, gpu: Mapping[str, Any]) -> None:
    if gpu["numa"] is not None:
        made.numa_node = gpu["numa"]
