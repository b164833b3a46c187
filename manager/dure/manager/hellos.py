"""What an agent says of itself: checked, and what became of its accelerators since it last did. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dure.fleet.v1 import fleet_pb2
from dure.wire import enforcement
from dure.wire.errors import InvalidInput

DEVICES_MAX, LIMITATIONS_MAX = 256, 50


@dataclass(frozen=True)
class News:
    """Something about a device that people should hear of; `reason` is an event's."""

    device: str
    reason: str
    sentence: str
    warning: bool


def checked(hello: fleet_pb2.Hello, peer: str) -> fleet_pb2.Hello:
    """The hello, with the remote address filled in. Raises InvalidInput on nonsense."""
    if hello.protocol_version < 1:
        raise InvalidInput("protocol_version must be at least 1; this manager speaks 1")
    if any(amount < 0 for amount in hello.slots.values()):
        raise InvalidInput("an agent has no negative slots")
    check_devices(hello.devices)
    hello.resource_group = hello.resource_group or "default"
    if not hello.advertise_address and peer.startswith(("ipv4:", "ipv6:")):
        hello.advertise_address = peer.split(":", 1)[1].rsplit(":", 1)[0].strip("[]")
    del hello.limitations[LIMITATIONS_MAX:]
    return hello


def check_devices(devices: Sequence[fleet_pb2.Device]) -> None:
    """Raises InvalidInput on nonsense."""
    if len(devices) > DEVICES_MAX:
        raise InvalidInput(f"an agent has at most {DEVICES_MAX} devices")
    ids = {device.id for device in devices}
    if "" in ids:
        raise InvalidInput("a device of this agent has no id")
    if len(ids) != len(devices):
        raise InvalidInput("two devices of this agent have one id")
    for device in devices:
        if any(amount < 0 for amount in device.slots.values()):
            raise InvalidInput(f"device `{device.id}` has negative slots")
        if device.parent == device.id:
            raise InvalidInput(f"device `{device.id}` cannot be a part of itself")


def have_overlay(hellos: Sequence[fleet_pb2.Hello]) -> bool:
    """Whether a session over the nodes of these agents can have one network over them."""
    return (
        len({hello.overlay for hello in hellos}) == 1
        and hellos[0].overlay != ""
        and any(hello.makes_overlay for hello in hellos)
    )


def news(before: Sequence[fleet_pb2.Device], after: Sequence[fleet_pb2.Device]) -> list[News]:
    """What went, what came back, and what keeps less to itself than it did, in the order of the devices."""
    old = {device.id: device for device in before}
    new = {device.id: device for device in after}
    found = []
    for uid in dict.fromkeys([*old, *new]):
        was, now = old.get(uid), new.get(uid)
        if now is None:
            found.append(News(uid, "DEVICE_LOST", f"GPU `{uid}` is not there any more", True))
        elif not now.healthy and (was is None or was.healthy):
            why = f": {now.detail}" if now.detail else ""
            found.append(News(uid, "DEVICE_LOST", f"GPU `{uid}` is out of order{why}", True))
        elif was is None:
            found.append(News(uid, "DEVICE_BACK", f"GPU `{uid}` is there now", False))
        elif now.healthy and not was.healthy:
            found.append(News(uid, "DEVICE_BACK", f"GPU `{uid}` is in order again", False))
        elif was.enforcement and now.enforcement != was.enforcement:
            sentence = (
                f"GPU `{uid}` enforces `{now.enforcement or enforcement.NONE}`, no longer `{was.enforcement}`"
            )
            worse = enforcement.rank(now.enforcement) < enforcement.rank(was.enforcement)
            found.append(News(uid, "DEVICE_ENFORCEMENT", sentence, worse))
    return found
