"""Devices of a node: what is free of them, and which a kernel gets.

One share is one physical GPU. A request of at most one share gets one device, the fullest that has room
(best fit), and is never split; one above gets ceil(request) devices in portions that are equal to within a
milli-share and sum to the request exactly. `cuda.shares` and `cuda.device` exclude each other on a device.

A part of a GPU (MIG) is given to one kernel only, never together with another device and never as
`cuda.device`; whole GPUs are preferred to it. A GPU and its parts are never both offered. Several devices are
those that are connected best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from dure.manager.model import DeviceShare, Grant
from dure.wire import enforcement
from dure.wire.quantities import DEVICES, MILLI, SHARES, format_slot

# Distance of devices of which nobody said how they are connected: as far as can be.
FARTHEST = 50
# Sets of devices that are compared one by one. Beyond, sets are grown from as many beginnings as take so many
# looks at a pair: placement happens within a transaction, and must not take longer than some milliseconds.
SETS_MAX, LOOKS_MAX = 256, 10_000


@dataclass(frozen=True)
class DeviceCapacity:
    """An accelerator that a node registered, with the slots that it offers.

    `parent` is the GPU that it is a part of, `distances` are those to other devices (smaller is better),
    `enforcement` is the mode that keeps kernels within their share of it.
    """

    id: str
    slots: Mapping[str, int]
    healthy: bool = True
    detail: str = ""
    parent: str = ""
    enforcement: str = ""
    distances: Mapping[str, int] = field(default_factory=dict)


def portions(shares: int) -> list[int]:
    """`cuda.shares` of a request, per device: 500 -> [500], 1500 -> [750, 750], 2500 -> [834, 833, 833]."""
    count = -(-shares // MILLI)
    base, rest = divmod(shares, count)
    return [base + 1] * rest + [base] * (count - rest)


def fit(
    slots: Mapping[str, int], least: str, devices: Sequence[DeviceCapacity], grants: Iterable[Grant]
) -> tuple[DeviceShare, ...] | str:
    """What a kernel gets of the devices beside `grants`, or why it cannot. `least` is the enforcement that
    its shares must have, empty for any."""
    free = _Free(devices, grants)
    if SHARES in slots:
        return _fit_shares(slots[SHARES], least, free)
    if DEVICES in slots:
        return _fit_devices(slots[DEVICES], free)
    return ()


def free_shares(devices: Sequence[DeviceCapacity], grants: Iterable[Grant]) -> int:
    """Free `cuda.shares` of all healthy devices."""
    free = _Free(devices, grants)
    return sum(free.shares[device.id] for device in free.offered if device.healthy)


def used_shares(devices: Sequence[DeviceCapacity], grants: Iterable[Grant]) -> dict[str, int]:
    """Milli-shares of each device of which nobody else can have anything.

    A device taken as a whole counts as what it offers, and so does a part, however little was asked for.
    """
    free = _Free(devices, grants)
    return {
        device.id: device.slots.get(SHARES, 0) - free.shares[device.id]
        if device in free.offered
        else free.held.get(device.id, 0)
        for device in devices
    }


def offered(devices: Sequence[DeviceCapacity], grants: Iterable[Grant]) -> list[DeviceCapacity]:
    """Those that count: a GPU and its parts are never both there."""
    return _Free(devices, grants).offered


class _Free:
    """What there is beside the grants: the devices that are `offered`, and the free `shares` of each."""

    def __init__(self, devices: Sequence[DeviceCapacity], grants: Iterable[Grant]) -> None:
        self.held: dict[str, int] = {}
        taken: set[str] = set()
        for share in (share for grant in grants for share in grant.devices):
            self.held[share.device] = self.held.get(share.device, 0) + share.amount
            if share.slot == DEVICES:
                taken.add(share.device)
        # A GPU is in MIG mode if somebody has a part of it, or a part is there and nobody has the GPU.
        ids = {device.id for device in devices}
        divided = {
            device.parent
            for device in devices
            if device.id in self.held or (device.healthy and device.parent not in self.held)
        }
        self.offered = [
            device
            for device in devices
            if (
                device.parent in divided or device.parent not in ids
                if device.parent
                else device.id not in divided
            )
        ]
        self.shares = {
            device.id: 0
            if device.id in taken or (device.parent and {device.id, device.parent} & self.held.keys())
            else max(device.slots.get(SHARES, 0) - self.held.get(device.id, 0), 0)
            for device in self.offered
        }
        self.healthy = [device for device in self.offered if device.healthy]
        self.gpus = [device for device in self.healthy if not device.parent and SHARES in device.slots]
        self.parts = [device for device in self.healthy if device.parent and SHARES in device.slots]


def _fit_shares(wanted: int, least: str, free: _Free) -> tuple[DeviceShare, ...] | str:
    sizes, rank = portions(wanted), enforcement.rank(least)
    gpus = [device for device in free.gpus if enforcement.rank(device.enforcement) >= rank]
    parts = [device for device in free.parts if enforcement.rank(device.enforcement) >= rank]
    chosen: Sequence[DeviceCapacity]
    if len(sizes) == 1:
        chosen = _best_fit(wanted, gpus, free) or _best_fit(wanted, parts, free)
    else:
        chosen = _best_connected(sizes, free.shares, gpus)
    if chosen:
        return tuple(DeviceShare(device.id, SHARES, size) for device, size in zip(chosen, sizes, strict=True))
    return _short_shares(wanted, sizes, least, [*gpus, *parts], free)


def _best_fit(size: int, devices: Sequence[DeviceCapacity], free: _Free) -> list[DeviceCapacity]:
    """The device with the least room that is enough; of parts, the smallest."""
    fitting = [(free.shares[device.id], device.id, device) for device in devices]
    return [device for room, _, device in sorted(fitting, key=lambda one: one[:2]) if room >= size][:1]


def _best_connected(
    sizes: Sequence[int], rooms: Mapping[str, int], devices: Sequence[DeviceCapacity]
) -> Sequence[DeviceCapacity]:
    """Devices for the portions, largest first; empty if they do not fit.

    The set with the shortest ways between its members; then the one that leaves the least, then by id.
    """
    ordered = sorted((d for d in devices if rooms[d.id] >= sizes[-1]), key=lambda d: (rooms[d.id], d.id))
    # Portions differ by a milli-share at most: not every device with room for a small one only can be used.
    tight = {device.id for device in ordered if rooms[device.id] < sizes[0]}
    small = sum(1 for size in sizes if size == sizes[-1])
    if len(ordered) - max(len(tight) - small, 0) < len(sizes):
        return []
    sets: Iterable[Sequence[DeviceCapacity]]
    if comb(len(ordered), len(sizes)) <= SETS_MAX:
        sets = (
            chosen
            for chosen in combinations(ordered, len(sizes))
            if sum(device.id in tight for device in chosen) <= small
        )
    else:
        beginnings = ordered[: max(1, LOOKS_MAX // (len(ordered) * len(sizes)))]
        sets = (_grow(first, ordered, len(sizes), tight, small) for first in beginnings)
    best = min(sets, key=lambda chosen: _spread(chosen, rooms))
    return sorted(best, key=lambda device: (device.id in tight, rooms[device.id], device.id))


def _spread(chosen: Sequence[DeviceCapacity], rooms: Mapping[str, int]) -> tuple[int, int, list[str]]:
    """Smaller is better."""
    ways = sum(_distance(one, other) for one, other in combinations(chosen, 2))
    return ways, sum(rooms[device.id] for device in chosen), sorted(device.id for device in chosen)


def _grow(
    first: DeviceCapacity, ordered: Sequence[DeviceCapacity], count: int, tight: set[str], small: int
) -> list[DeviceCapacity]:
    """A set around `first`, to which always the nearest is added; of equals the fullest."""
    chosen = [first]
    left = [device for device in ordered if device.id != first.id]
    ways = {device.id: _distance(first, device) for device in left}
    while len(chosen) < count:
        full = sum(device.id in tight for device in chosen) >= small
        nearest = min((d for d in left if not (full and d.id in tight)), key=lambda d: ways[d.id])
        chosen.append(nearest)
        left.remove(nearest)
        for device in left:
            ways[device.id] += _distance(nearest, device)
    return chosen


def _distance(one: DeviceCapacity, other: DeviceCapacity) -> int:
    return min(one.distances.get(other.id, FARTHEST), other.distances.get(one.id, FARTHEST))


def _short_shares(
    wanted: int, sizes: list[int], least: str, eligible: Sequence[DeviceCapacity], free: _Free
) -> str:
    want, several = format_slot(SHARES, wanted), len(sizes) > 1
    if not any(SHARES in device.slots for device in free.offered):
        return f"{SHARES}: no GPU, {want} wanted"
    weak = [device for device in (*free.gpus, *free.parts) if device not in eligible]
    if least == enforcement.MIG and eligible and not several:
        return f"{SHARES}: {_short_parts(wanted, eligible, free)}, {want} wanted, `{least}` is required"
    with_room = [
        device
        for device in (*eligible, *weak)
        if free.shares[device.id] >= sizes[-1] and not (several and device.parent)
    ]
    if len(with_room) >= len(sizes) and any(device in weak for device in with_room):
        roomy = [device for device in with_room if device in weak]
        modes = " or ".join(sorted({f"`{device.enforcement or enforcement.NONE}`" for device in roomy}))
        has = "has room, but enforces" if len(roomy) == 1 else "have room, but enforce"
        return f"{SHARES}: {_count(roomy)} {has} {modes}, `{least}` is required{_broken(free)}"
    note = _broken(free)
    if weak:
        note += f" ({_count(weak)} {'enforces' if len(weak) == 1 else 'enforce'} less than `{least}`)"
    if several and any(device.parent and free.shares[device.id] for device in eligible):
        note += " (parts of GPUs cannot be joined to others)"
    rooms = [free.shares[device.id] for device in eligible if not (several and device.parent)]
    pieces, total = sorted((room for room in rooms if room > 0), reverse=True), sum(rooms)
    shown = " and ".join(format_slot(SHARES, amount) for amount in pieces[:4])
    if len(pieces) > 4:
        shown += f" and {len(pieces) - 4} more"
    if total >= wanted and not several:
        return (
            f"{SHARES}: fragmented, {format_slot(SHARES, total)} free, but in pieces of {shown}; "
            f"{want} wanted on one GPU{note}"
        )
    if total >= wanted:
        each = " + ".join(format_slot(SHARES, size) for size in sizes)
        return f"{SHARES}: {shown or '0.00'} free, {each} wanted on {len(sizes)} GPUs{note}"
    return f"{SHARES}: {format_slot(SHARES, total)} free, {want} wanted{note}"


def _short_parts(wanted: int, parts: Sequence[DeviceCapacity], free: _Free) -> str:
    """What is wrong with parts of which none has room."""
    largest = max(part.slots[SHARES] for part in parts)
    if largest < wanted:
        return f"the largest part of a GPU in MIG mode is {format_slot(SHARES, largest)}{_broken(free)}"
    rooms = [free.shares[part.id] for part in parts if free.shares[part.id]]
    if rooms:
        most = format_slot(SHARES, max(rooms))
        return f"the largest free part of a GPU in MIG mode is {most}{_broken(free)}"
    taken = "the only part of a GPU in MIG mode is" if len(parts) == 1 else ""
    return f"{taken or f'all {len(parts)} parts of GPUs in MIG mode are'} taken{_broken(free)}"


def _fit_devices(wanted: int, free: _Free) -> tuple[DeviceShare, ...] | str:
    count = wanted // MILLI
    whole = [
        device
        for device in free.healthy
        if not device.parent and DEVICES in device.slots and device.id not in free.held
    ]
    if len(whole) < count:
        return f"{DEVICES}: {len(whole)} whole GPUs free, {count} wanted{_broken(free)}"
    chosen = _best_connected([MILLI] * count, {device.id: MILLI for device in whole}, whole)
    return tuple(DeviceShare(device.id, DEVICES, MILLI) for device in chosen)


def _broken(free: _Free) -> str:
    """What is out of order, and why."""
    broken = [device for device in free.offered if not device.healthy]
    why = next((device.detail for device in broken if device.detail), "")
    return f" ({_count(broken)} out of order{f': {why}' if why else ''})" if broken else ""


def _count(devices: Sequence[DeviceCapacity]) -> str:
    return "1 GPU" if len(devices) == 1 else f"{len(devices)} GPUs"
