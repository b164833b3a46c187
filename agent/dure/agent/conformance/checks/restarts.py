"""What becomes of kernels when their agent is killed."""

from __future__ import annotations

import asyncio

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2


@check("5.1", alone=True)
async def kernels_outlive_the_agent(stage: Stage) -> None:
    """After SIGKILL of the agent a kernel serves on, and the next agent adopts it as it is."""
    spec = stage.spec(health_check=specs.health_check())
    before = await stage.healthy(spec)
    born = (await stage.ask(before))["born"]

    async def meanwhile() -> None:
        await asyncio.sleep(0.5)
        again = await stage.ask(before)
        demand(again["born"] == born, "the same process while no agent runs", "another one")

    told = len(stage.manager.history[spec.uid])
    stream = await stage.restart(meanwhile)
    expected, after = specs.standing(before), specs.standing(stream.reported.get(spec.uid))
    demand(after == expected, f"the kernel in the full report as it was: {expected}", after)
    await asyncio.sleep(1.0)
    later = [one for _, one in stage.manager.history[spec.uid]][told:]
    wrong = [one for one in later if (one.phase, one.health) != (before.phase, before.health)]
    demand(not wrong, "RUNNING and HEALTHY all the time", wrong and specs.told(wrong[0]))
    demand((await stage.ask(before))["born"] == born, "the same process", "it was started anew")
    await stage.gone(spec.uid)


@check("5.2", alone=True)
async def died_meanwhile(stage: Stage) -> None:
    """A kernel that ended while no agent ran is reported with its true exit code."""
    exits, killed = stage.spec(), stage.spec()
    statuses = [await stage.healthy(exits), await stage.healthy(killed)]

    async def meanwhile() -> None:
        await stage.ask(statuses[0], "exit/7")
        await stage.ask(statuses[1], "signal/9")
        await asyncio.sleep(1.5)

    stream = await stage.restart(meanwhile)
    for spec, expected in ((exits, ("EXITED", 7)), (killed, ("SIGNALED", 137))):
        found = stream.reported.get(spec.uid)
        demand(found is not None, "the kernel in the full report", "it is missing there")
        status = await stage.end(spec)
        demand((status.exit.reason, status.exit.code) == expected, f"{expected}", specs.told(status))


@check("5.3", alone=True)
async def removed_meanwhile(stage: Stage) -> None:
    """A kernel that was removed while no agent ran is stopped by the next one."""
    spec = stage.spec()
    status = await stage.healthy(spec)

    async def meanwhile() -> None:
        stage.manager.remove(spec.uid, spec.generation + 1)

    await stage.restart(meanwhile)
    gone = await stage.status(spec.uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_GONE, "GONE")
    demand(gone.generation == spec.generation + 1, "the removal's generation", gone.generation)
    demand(status.port > 0, "a port", status.port)


CHECKS = (kernels_outlive_the_agent, died_meanwhile, removed_meanwhile)
