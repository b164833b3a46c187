"""Parts of devices: what an agent refuses, and what a kernel is told of its own."""

from __future__ import annotations

from dure.agent.conformance.outcome import NotApplicable, check, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_SHARES = "cuda.shares"


@check("9.1")
async def unknown_device(stage: Stage) -> None:
    """A grant of a device that the node does not have is refused."""
    await stage.refused(stage.spec(devices=[_grant("no-such-device", 100)]), "START_FAILED")


@check("9.1", alone=True)
async def more_than_there_is(stage: Stage) -> None:
    """A grant that does not fit beside those of other kernels is refused, and fits when they are gone."""
    device = _device(stage)
    first = stage.spec(devices=[_grant(device.id, 700)])
    await stage.healthy(first)
    await stage.refused(stage.spec(devices=[_grant(device.id, 400)]), "START_FAILED")
    await stage.healthy(stage.spec(devices=[_grant(device.id, 300)]))
    await stage.gone(first.uid)
    await stage.healthy(stage.spec(devices=[_grant(device.id, 400)]))


@check("9.1", alone=True)
async def shares_or_whole(stage: Stage) -> None:
    """A device of which shares are taken is not given away whole."""
    device = _device(stage)
    if "cuda.device" not in device.slots:
        raise NotApplicable(f"device `{device.id}` is not offered whole")
    await stage.healthy(stage.spec(devices=[_grant(device.id, 100)]))
    whole = fleet_pb2.DeviceGrant(device=device.id, slot="cuda.device", amount=1000)
    await stage.refused(stage.spec(devices=[whole]), "START_FAILED")


@check("9.2", alone=True)
async def device_variables(stage: Stage) -> None:
    """A kernel is told its devices."""
    device = _device(stage)
    environ = (await stage.ask(await stage.healthy(stage.spec(devices=[_grant(device.id, 500)]))))["environ"]
    expected = {"GPU_COUNT": "1", "DURE_DEVICES": device.id, "DURE_DEVICE_AMOUNTS": "0.5"}
    wrong = {name: environ.get(name) for name, value in expected.items() if environ.get(name) != value}
    demand(not wrong, f"{expected}", wrong)


def _device(stage: Stage) -> fleet_pb2.Device:
    for one in stage.hello.devices:
        if one.healthy and not one.parent and one.slots.get(_SHARES) == 1000:
            return one
    raise NotApplicable("the node has no healthy device that offers shares")


def _grant(device: str, amount: int) -> fleet_pb2.DeviceGrant:
    return fleet_pb2.DeviceGrant(device=device, slot=_SHARES, amount=amount)


CHECKS = (unknown_device, more_than_there_is, shares_or_whole, device_variables)
