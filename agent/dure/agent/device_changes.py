"""What a look at the node's accelerators changes: which devices are offered, who must go, what to say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from dure.agent.accelerators import Found
from dure.agent.backends.base import Ended
from dure.fleet.v1 import fleet_pb2

DEVICE_LOST = "DEVICE_LOST"
NOT_SEEN_YET = "it was not seen since the agent was started"
NOT_FOUND = "it is not found on this node any more"


@dataclass(frozen=True)
class Changes:
    """All devices from now on. `lost` are those whose kernels cannot go on, each with a sentence; `troubles`
    and `recoveries` are sentences for the log."""

    devices: Mapping[str, fleet_pb2.Device]
    lost: Mapping[str, str] = field(default_factory=dict)
    troubles: tuple[str, ...] = ()
    recoveries: tuple[str, ...] = ()


def changes(
    before: Mapping[str, fleet_pb2.Device],
    found: Found,
    held: Collection[str],
    withheld: Mapping[str, str],
) -> Changes:
    """`held` are devices that kernels have: one that is not found any more stays for them, and gets no
    others. `withheld` says of accelerators, by name, why their devices cannot be given to kernels."""
    after: dict[str, fleet_pb2.Device] = {}
    for device in found.devices:
        after[device.id] = now = _copy(device)
        why = withheld.get(device.accelerator, "")
        if why and now.healthy:
            now.healthy, now.detail = False, why
        if device.id in before:
            # Found out by others than who finds devices.
            now.enforcement = before[device.id].enforcement
    for uid, was in before.items():
        if uid in after or uid not in held:
            continue
        after[uid] = now = _copy(was)
        now.healthy, now.detail = False, NOT_FOUND
    troubles = [
        f"{name(device)} cannot be used: {device.detail}"
        for uid, device in after.items()
        if not device.healthy and _standing(before.get(uid)) != _standing(device)
    ]
    recoveries = [
        f"{name(device)} is back"
        for uid, device in after.items()
        if device.healthy and uid in before and not before[uid].healthy
    ]
    gone = [f"{name(was)} is not offered any more" for uid, was in before.items() if uid not in after]
    lost = {
        uid: f"{name(after[uid])} is lost: {after[uid].detail}" for uid in sorted(found.lost) if uid in after
    }
    return Changes(after, lost, (*troubles, *gone), tuple(recoveries))


def doomed(kernels: Iterable[fleet_pb2.KernelSpec], lost: Mapping[str, str]) -> dict[str, Ended]:
    """Which kernels must end, and how: those that have a lost device."""
    ends: dict[str, Ended] = {}
    for spec in kernels:
        reasons = [lost[grant.device] for grant in spec.devices if grant.device in lost]
        if reasons:
            ends[spec.uid] = Ended(DEVICE_LOST, -1, "; ".join(reasons))
    return ends


def remembered(known: Iterable[fleet_pb2.Device], held: Collection[str]) -> dict[str, fleet_pb2.Device]:
    """Of the devices of the agent before, those that kernels have; nothing is known of them yet."""
    kept: dict[str, fleet_pb2.Device] = {}
    for device in known:
        if device.id in held:
            kept[device.id] = now = _copy(device)
            now.healthy, now.detail = False, NOT_SEEN_YET
    return kept


def name(device: fleet_pb2.Device) -> str:
    return f"device {device.id} ({device.model})"


def _standing(device: fleet_pb2.Device | None) -> tuple[bool, str] | None:
    return None if device is None else (device.healthy, device.detail)


def _copy(device: fleet_pb2.Device) -> fleet_pb2.Device:
    copied = fleet_pb2.Device()
    copied.CopyFrom(device)
    return copied
