"""What this agent checks of a grant of devices; the manager's count is not trusted blindly.

The rules are the manager's: at most one share is of one device and never split, more than that is on whole
GPUs in equal portions, a part of a GPU is for one kernel alone, and `cuda.device` leaves nothing of a device
to others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dure.fleet.v1 import fleet_pb2
from dure.wire.quantities import DEVICES, MILLI, SHARES


def refusal(
    grants: Sequence[fleet_pb2.DeviceGrant],
    devices: Mapping[str, fleet_pb2.Device],
    others: Iterable[Sequence[fleet_pb2.DeviceGrant]],
) -> str:
    """Empty if the grants fit beside those of the other kernels, else a sentence."""
    taken: dict[str, int] = defaultdict(int)
    slots: dict[str, set[str]] = defaultdict(set)
    for other in others:
        for grant in other:
            taken[grant.device] += grant.amount
            slots[grant.device].add(grant.slot)
    held = frozenset(taken)
    for grant in grants:
        device = devices.get(grant.device)
        if device is None:
            known = ", ".join(sorted(devices)) or "none"
            return f"device `{grant.device}` is not on this node; its devices: {known}"
        if grant.slot not in device.slots:
            return f"device `{grant.device}` does not offer `{grant.slot}`"
        if grant.amount <= 0:
            return f"a grant of {grant.amount / 1000:g} {grant.slot} on device `{grant.device}` is nothing"
        if not device.healthy:
            return f"device `{grant.device}` is out of order: {device.detail or 'no reason was given'}"
        if wrong := _divided(device, devices, held):
            return wrong
        slots[grant.device].add(grant.slot)
        if len(slots[grant.device]) > 1:
            return f"`cuda.shares` and `cuda.device` exclude each other on device `{grant.device}`"
        used = taken[grant.device]
        taken[grant.device] += grant.amount
        if taken[grant.device] > device.slots[grant.slot]:
            return (
                f"device `{grant.device}` has {device.slots[grant.slot] / 1000:g} {grant.slot}, "
                f"{used / 1000:g} in use: {grant.amount / 1000:g} more do not fit"
            )
    return _uneven(grants, devices)


def _divided(device: fleet_pb2.Device, devices: Mapping[str, fleet_pb2.Device], held: frozenset[str]) -> str:
    """Why a part of a GPU, or a GPU that has parts, cannot be had; empty for any other."""
    if device.parent:
        if device.id in held:
            return f"device `{device.id}` is a part of a GPU and in use: another kernel has it alone"
        if device.parent in held:
            return f"device `{device.id}` is a part of the GPU `{device.parent}`, which is in use as a whole"
        return ""
    parts = [part for part in devices.values() if part.parent == device.id]
    if any(part.id in held or (part.healthy and device.id not in held) for part in parts):
        return f"device `{device.id}` is divided: only its parts can be granted"
    return ""


def _uneven(grants: Sequence[fleet_pb2.DeviceGrant], devices: Mapping[str, fleet_pb2.Device]) -> str:
    """What is wrong with the grants of a kernel taken together."""
    if len({grant.slot for grant in grants}) > 1:
        return "a kernel cannot have `cuda.shares` and `cuda.device`"
    if len({grant.device for grant in grants}) < len(grants):
        return "one device is granted twice to one kernel"
    if len(grants) > 1 and any(devices[grant.device].parent for grant in grants):
        return "a part of a GPU cannot be granted together with other devices"
    amounts = [grant.amount for grant in grants]
    if any(grant.slot == DEVICES and grant.amount != MILLI for grant in grants):
        return "`cuda.device` is granted in whole devices only"
    if any(grant.slot == SHARES for grant in grants):
        count = -(-sum(amounts) // MILLI)
        if len(amounts) != count or max(amounts) - min(amounts) > 1:
            shown = " + ".join(f"{amount / 1000:g}" for amount in amounts)
            return f"cuda.shares of {shown} are not {count} equal portions"
    return ""
