"""What this agent checks of a grant of devices; the manager's count is not trusted blindly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from dure.fleet.v1 import fleet_pb2


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
    for grant in grants:
        device = devices.get(grant.device)
        if device is None:
            known = ", ".join(sorted(devices)) or "none"
            return f"device `{grant.device}` is not on this node; its devices: {known}"
        if grant.slot not in device.slots:
            return f"device `{grant.device}` does not offer `{grant.slot}`"
        if grant.amount <= 0:
            return f"a grant of {grant.amount / 1000:g} {grant.slot} on device `{grant.device}` is nothing"
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
    return ""
