"""Placement: which node and which devices a kernel gets, or why no node can take it.

Amounts are exact integers (milli-units). One share is one physical GPU. A request of at most one share
gets one device, the fullest that has room (best fit), and is never split; one above gets
ceil(request) devices in portions that are equal to within a milli-share and sum to the request exactly.
`cuda.shares` and `cuda.device` exclude each other on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dure.manager.model import DeviceShare, Grant
from dure.wire.quantities import CPU, DEVICES, MEM, MILLI, SHARES, format_slot, human_slot


@dataclass(frozen=True)
class DeviceCapacity:
    """An accelerator that a node registered, with the slots that it offers."""

    id: str
    slots: Mapping[str, int]
    healthy: bool = True
    detail: str = ""


@dataclass(frozen=True)
class Node:
    """An agent as placement sees it; `grants` are all of its kernels that are not GONE.

    Nodes with one `host_id` share a network namespace, so a fixed port is taken on all of them.
    `available` is false with the sentence in `unavailable_reason` for a node that must get nothing new.
    """

    uid: str
    name: str
    resource_group: str
    slots: Mapping[str, int]
    devices: Sequence[DeviceCapacity] = ()
    grants: Sequence[Grant] = ()
    host_id: str = ""
    available: bool = True
    unavailable_reason: str = ""


@dataclass(frozen=True)
class Request:
    """What a kernel needs; `peers` counts the replicas of its endpoint that each node has already."""

    slots: Mapping[str, int]
    resource_group: str
    fixed_port: int = 0
    peers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Why a node cannot take a kernel: a sentence for people."""

    node: str
    reason: str


@dataclass(frozen=True)
class Placed:
    """A place."""

    grant: Grant
    node: Node


@dataclass(frozen=True)
class NoPlace:
    """No node can take it now."""

    refusals: tuple[Refusal, ...] = ()

    def sentence(self, request: Request) -> str:
        """What is missing where, bounded to a few nodes."""
        if not self.refusals:
            return f"resource group `{request.resource_group}` has no agents; start one with `dure agent`"
        shown = [f"{refusal.node}: {refusal.reason}" for refusal in self.refusals[:8]]
        if len(self.refusals) > 8:
            shown.append(f"and {len(self.refusals) - 8} more nodes")
        return "no node has room: " + "; ".join(shown)


def place(request: Request, nodes: Iterable[Node]) -> Placed | NoPlace:
    """The best node, or why each node refuses.

    An endpoint's replicas are spread over nodes, so that losing one costs little; apart from that nodes
    are packed by GPU shares, which keeps whole GPUs free for those who need them. Ties go to the node with
    fewer kernels, then by name, so that the decision depends on nothing but its input.
    """
    nodes = [node for node in nodes if node.resource_group == request.resource_group]
    fixed_ports = {
        (node.host_id or node.uid, grant.fixed_port)
        for node in nodes
        for grant in node.grants
        if grant.fixed_port
    }
    refusals: list[Refusal] = []
    candidates: list[tuple[tuple[int, int, int, str], Placed]] = []
    for node in nodes:
        found = _fit(request, node, fixed_ports)
        if isinstance(found, Grant):
            peers = request.peers.get(node.uid, 0)
            rank = (peers, _free_shares_after(node, found), len(node.grants), node.name)
            candidates.append((rank, Placed(found, node)))
        else:
            refusals.append(Refusal(node.name, found))
    if candidates:
        return min(candidates, key=lambda candidate: candidate[0])[1]
    return NoPlace(tuple(sorted(refusals, key=lambda refusal: refusal.node)))


def portions(shares: int) -> list[int]:
    """`cuda.shares` of a request, per device: 500 -> [500], 1500 -> [750, 750], 2500 -> [834, 833, 833]."""
    count = -(-shares // MILLI)
    base, rest = divmod(shares, count)
    return [base + 1] * rest + [base] * (count - rest)


def free_shares(node: Node) -> dict[str, int]:
    """Free `cuda.shares` of each healthy device of a node that is not taken as a whole."""
    return {
        device.id: free
        for device in node.devices
        if device.healthy and SHARES in device.slots
        for free in [_device_free(node, device)]
        if free is not None
    }


@dataclass
class _Held:
    shares: int = 0
    whole: bool = field(default=False)


def _held(node: Node, device_id: str) -> _Held:
    held = _Held()
    for grant in node.grants:
        for share in grant.devices:
            if share.device == device_id:
                if share.slot == DEVICES:
                    held.whole = True
                else:
                    held.shares += share.amount
    return held


def _device_free(node: Node, device: DeviceCapacity) -> int | None:
    """Free milli-shares, None for a device taken as a whole."""
    held = _held(node, device.id)
    return None if held.whole else device.slots.get(SHARES, 0) - held.shares


def _free(node: Node, slot: str) -> int:
    return node.slots.get(slot, 0) - sum(grant.slots.get(slot, 0) for grant in node.grants)


def _free_shares_after(node: Node, grant: Grant) -> int:
    taken = sum(share.amount for share in grant.devices)
    return sum(free_shares(node).values()) - taken


def _fit(request: Request, node: Node, fixed_ports: set[tuple[str, int]]) -> Grant | str:
    if not node.available:
        return node.unavailable_reason or "not available"
    missing = [
        _short(slot, request.slots[slot], _free(node, slot), node.slots.get(slot, 0))
        for slot in (CPU, MEM)
        if request.slots.get(slot, 0) > _free(node, slot)
    ]
    devices: tuple[DeviceShare, ...] | str = ()
    if SHARES in request.slots:
        devices = _fit_shares(request.slots[SHARES], node)
    elif DEVICES in request.slots:
        devices = _fit_devices(request.slots[DEVICES], node)
    if isinstance(devices, str):
        missing.append(devices)
    if request.fixed_port and (node.host_id or node.uid, request.fixed_port) in fixed_ports:
        missing.append(
            f"port {request.fixed_port} is taken on this host by another session; write `{{port}}` instead "
            f"of {request.fixed_port} in the definition's command, then each session gets its own"
        )
    if missing:
        return ", ".join(missing)
    assert not isinstance(devices, str)
    plain = {slot: amount for slot, amount in request.slots.items() if slot in (CPU, MEM)}
    return Grant(node.uid, plain, devices, request.fixed_port)


def _short(slot: str, wanted: int, free: int, capacity: int) -> str:
    of = "" if wanted <= capacity else f", and {human_slot(slot, capacity)} in all"
    return f"{slot}: {human_slot(slot, max(free, 0))} free{of}, {human_slot(slot, wanted)} wanted"


def _fit_shares(wanted: int, node: Node) -> tuple[DeviceShare, ...] | str:
    free = free_shares(node)
    sizes = portions(wanted)
    # Best fit: the fullest device that still has room. The largest portions choose first, so equal
    # portions (they differ by at most one milli-share) cannot take the only device fit for a larger one.
    left = dict(free)
    taken: list[DeviceShare] = []
    for size in sizes:
        fitting = [(amount, device) for device, amount in left.items() if amount >= size]
        if not fitting:
            return _short_shares(wanted, sizes, node, free)
        _, device = min(fitting)
        del left[device]
        taken.append(DeviceShare(device, SHARES, size))
    return tuple(taken)


def _short_shares(wanted: int, sizes: list[int], node: Node, free: dict[str, int]) -> str:
    want = format_slot(SHARES, wanted)
    if not any(SHARES in device.slots for device in node.devices):
        return f"{SHARES}: no GPU, {want} wanted"
    total = sum(free.values())
    broken = [device for device in node.devices if not device.healthy]
    note = f" ({len(broken)} GPU(s) out of order: {broken[0].detail})" if broken else ""
    pieces = sorted((amount for amount in free.values() if amount > 0), reverse=True)
    shown = " and ".join(format_slot(SHARES, amount) for amount in pieces[:4])
    if len(pieces) > 4:
        shown += f" and {len(pieces) - 4} more"
    if total >= wanted and len(sizes) == 1:
        return (
            f"{SHARES}: fragmented, {format_slot(SHARES, total)} free, but in pieces of {shown}; "
            f"{want} wanted on one GPU{note}"
        )
    if total >= wanted:
        each = " + ".join(format_slot(SHARES, size) for size in sizes)
        return f"{SHARES}: {shown or '0.00'} free, {each} wanted on {len(sizes)} GPUs{note}"
    return f"{SHARES}: {format_slot(SHARES, total)} free, {want} wanted{note}"


def _fit_devices(wanted: int, node: Node) -> tuple[DeviceShare, ...] | str:
    count = wanted // MILLI
    whole = [
        device.id
        for device in node.devices
        if device.healthy and DEVICES in device.slots and _held(node, device.id) == _Held()
    ]
    if len(whole) < count:
        return f"{DEVICES}: {len(whole)} whole GPUs free, {count} wanted"
    return tuple(DeviceShare(device, DEVICES, MILLI) for device in sorted(whole)[:count])


def held_shares(node: Node, device_id: str) -> int:
    """Milli-shares of a device that are granted; a device taken as a whole counts as one share."""
    held = _held(node, device_id)
    return MILLI if held.whole else held.shares
