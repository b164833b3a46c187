"""What the manager wants: snapshots, generations, removals, repeated messages."""

from __future__ import annotations

import asyncio

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import Failed, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_GONE = fleet_pb2.KERNEL_PHASE_GONE
_UNKNOWN = "00000000-0000-4000-8000-000000000000"


@check("3.2")
async def phases_in_order(stage: Stage) -> None:
    """A start is reported as PREPARING, then RUNNING with host and port; a removal ends with GONE."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    demand(status.host and 0 < status.port < 65536, "host and port", f"`{status.host}`, {status.port}")
    await stage.gone(spec.uid)
    seen = [one.phase for _, one in stage.manager.history[spec.uid]]
    demand(seen[0] == fleet_pb2.KERNEL_PHASE_PREPARING, "PREPARING first", specs.phase_name(seen[0]))
    demand(
        seen == sorted(seen),
        "phases that only go on: PREPARING, RUNNING, STOPPING, GONE",
        ", ".join(specs.phase_name(one) for one in seen),
    )


@check("4.1", alone=True)
async def snapshot_removes(stage: Stage) -> None:
    """What stands in no piece of a snapshot is removed, once the snapshot is complete; the rest stays."""
    kept, other, dropped = stage.spec(), stage.spec(), stage.spec()
    statuses = [await stage.healthy(spec) for spec in (kept, other, dropped)]
    born = [(await stage.ask(status))["born"] for status in statuses[:2]]
    before = await stage.connected()
    stage.manager.forget(dropped.uid)
    stage.manager.piece_pause_s = 0.5
    try:
        stage.manager.hang_up()
        await stage.manager.until(lambda: before.ended_s > 0)
        await stage.status(dropped.uid, lambda s: s.phase == _GONE, "GONE of the kernel that was left out")
    finally:
        stage.manager.piece_pause_s = 0.0
    for status, one in zip(statuses[:2], born, strict=True):
        again = (await stage.ask(status))["born"]
        demand(again == one, "kernels of the snapshot left alone", "one was started anew")


@check("4.3")
async def replay(stage: Stage) -> None:
    """The same wish again changes nothing."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    born = (await stage.ask(status))["born"]
    for _ in range(3):
        stage.manager.want(spec)
    await asyncio.sleep(0.7)
    again = await stage.ask(status)
    demand(again["born"] == born, "the same process", "another one")
    newest = stage.manager.statuses[spec.uid]
    demand(newest.phase == fleet_pb2.KERNEL_PHASE_RUNNING, "RUNNING", specs.told(newest))


@check("4.4")
async def lower_generation(stage: Stage) -> None:
    """A wish of a lower generation than the one known is refused."""
    spec = stage.spec(generation=5)
    status = await stage.healthy(spec)
    demand(status.generation == 5, "generation 5 in the report", status.generation)
    gone = fleet_pb2.KernelRemoval(uid=spec.uid, generation=4)
    stage.manager.send(fleet_pb2.ConnectResponse(desired=fleet_pb2.Desired(removals=[gone])))
    await asyncio.sleep(1.0)
    newest = stage.manager.statuses[spec.uid]
    demand(newest.phase == fleet_pb2.KERNEL_PHASE_RUNNING, "RUNNING on", specs.told(newest))
    await stage.ask(status)
    status = await stage.gone(spec.uid, 6)
    demand(status.generation == 6, "generation 6 with GONE", status.generation)


@check("4.5")
async def unknown_removal(stage: Stage) -> None:
    """The removal of a kernel that it does not know is answered with GONE."""
    status = await stage.gone(_UNKNOWN, 7)
    stage.manager.forget(_UNKNOWN)
    demand(status.generation == 7, "the generation of the removal, 7", status.generation)


@check("4.6")
async def removed_stays_gone(stage: Stage) -> None:
    """A kernel that was removed is not started by a late wish: it is told again that it is GONE."""
    spec = stage.spec("exit 0")
    await stage.exited(spec)
    await stage.gone(spec.uid, 3)
    told = len(stage.manager.history[spec.uid])
    stage.manager.send(fleet_pb2.ConnectResponse(desired=fleet_pb2.Desired(kernels=[spec])))
    await stage.until(
        lambda: len(stage.manager.history[spec.uid]) > told, "GONE told again", lambda: "no report of it"
    )
    await asyncio.sleep(0.5)
    newest = stage.manager.statuses[spec.uid]
    demand(newest.phase == _GONE, "GONE", specs.told(newest))


@check("4.8")
async def removal_while_preparing(stage: Stage) -> None:
    """A kernel can be removed before its command runs."""
    wait = fleet_pb2.RunCommand(command=["sleep", "600"], check=True)
    spec = stage.spec(pre_start_actions=[fleet_pb2.PreStartAction(run_command=wait)])
    stage.manager.want(spec)
    await stage.status(spec.uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_PREPARING, "PREPARING")
    await asyncio.sleep(0.5)
    try:
        async with asyncio.timeout(15):
            await stage.gone(spec.uid)
    except TimeoutError as error:
        seen = specs.told(stage.manager.statuses.get(spec.uid))
        raise Failed("GONE soon, whatever goes on", f"{seen}, 15 s later") from error


CHECKS = (
    phases_in_order,
    replay,
    lower_generation,
    unknown_removal,
    removed_stays_gone,
    removal_while_preparing,
    snapshot_removes,
)
