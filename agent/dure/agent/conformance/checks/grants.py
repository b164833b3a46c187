"""Parts of devices: what an agent refuses, and what a kernel is told of its own."""

from __future__ import annotations

from collections.abc import Callable

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import NotApplicable, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_SHARES = "cuda.shares"
# What keeps a kernel within its part, the weakest first.
_MODES = ("none", "watchdog", "hook", "mps", "mig")


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


@check("9.3", alone=True)
async def enforcement_is_told(stage: Stage) -> None:
    """What keeps a kernel within its part of a device is told, and nothing of one that has none."""
    device = _device(stage)
    spec, without = stage.spec(devices=[_grant(device.id, 200)]), stage.spec()
    await stage.healthy(spec)
    status = await stage.status(
        spec.uid, lambda s: bool(s.enforcement), "`enforcement` of a kernel with a device"
    )
    demand(status.enforcement in _MODES, f"one of {', '.join(_MODES)}", status.enforcement)
    status = await stage.healthy(without)
    demand(not status.enforcement, "no enforcement of a kernel without a device", status.enforcement)


@check("9.3", alone=True)
async def enforcement_that_is_missing(stage: Stage) -> None:
    """A kernel that requires more than can be verified ends with ENFORCEMENT_FAILED."""
    device = _device(stage)
    best = _MODES[-1]
    if device.enforcement == best:
        raise NotApplicable(f"device `{device.id}` has the best enforcement that there is")
    spec = stage.spec(devices=[_grant(device.id, 200)], require_enforcement=best)
    status = await stage.exited(spec)
    demand(
        status.exit.reason == "ENFORCEMENT_FAILED" and status.exit.message,
        "ENFORCEMENT_FAILED and a message for people",
        specs.told(status),
    )


@check("9.4", alone=True)
async def serial_start(stage: Stage) -> None:
    """Of two kernels with serial_start on one device the second starts when the first is healthy."""
    device = _device(stage)
    kernels = [
        stage.spec(devices=[_grant(device.id, 200)], serial_start=True, environ={"WAIT_S": "1.5"})
        for _ in range(2)
    ]
    stage.manager.want(*kernels)
    for spec in kernels:
        await stage.become(spec, fleet_pb2.KERNEL_HEALTH_HEALTHY)
    running = [
        _first(stage, spec.uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING) for spec in kernels
    ]
    healthy = [
        _first(stage, spec.uid, lambda s: s.health == fleet_pb2.KERNEL_HEALTH_HEALTHY) for spec in kernels
    ]
    # Times are those of reports, so a little may be lost between two.
    demand(
        max(running) > min(healthy) - 0.3,
        "the second RUNNING after the first is HEALTHY",
        f"RUNNING {max(running) - min(running):.1f} s after the other, which was HEALTHY after "
        f"{min(healthy) - min(running):.1f} s",
    )


def _first(stage: Stage, uid: str, condition: Callable[[fleet_pb2.KernelStatus], bool]) -> float:
    """When it was first told of a kernel, by the monotonic clock."""
    return next(at_s for at_s, status in stage.manager.history[uid] if condition(status))


def _device(stage: Stage) -> fleet_pb2.Device:
    for one in stage.hello.devices:
        if one.healthy and not one.parent and one.slots.get(_SHARES) == 1000:
            return one
    raise NotApplicable("the node has no healthy device that offers shares")


def _grant(device: str, amount: int) -> fleet_pb2.DeviceGrant:
    return fleet_pb2.DeviceGrant(device=device, slot=_SHARES, amount=amount)


CHECKS = (
    unknown_device,
    more_than_there_is,
    shares_or_whole,
    device_variables,
    enforcement_is_told,
    enforcement_that_is_missing,
    serial_start,
)
