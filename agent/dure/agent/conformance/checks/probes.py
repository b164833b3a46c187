"""Health: by HealthCheck, or by the port alone."""

from __future__ import annotations

import asyncio
import time

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_HEALTHY, _UNHEALTHY = fleet_pb2.KERNEL_HEALTH_HEALTHY, fleet_pb2.KERNEL_HEALTH_UNHEALTHY


@check("8.1")
async def health_check(stage: Stage) -> None:
    """HEALTHY by the answer, UNHEALTHY after more than max_retries failures in a row, and back again."""
    check = specs.health_check(max_retries=2, expected_status_code=204)
    spec = stage.spec(health_check=check, environ={"ANSWER": "204"})
    status = await stage.healthy(spec)
    first = next(one for _, one in stage.manager.history[spec.uid] if one.phase == status.phase)
    demand(first.health != _UNHEALTHY, "DEGRADED at first", specs.told(first))
    await stage.ask(status, "answer/503")
    status = await stage.become(spec, _UNHEALTHY)
    demand(status.probe_status_code == 503, "the status 503 of the probe", status.probe_status_code)
    demand(status.consecutive_failures > 2, "more than 2 failures in a row", status.consecutive_failures)
    demand(status.probe_detail, "what went wrong, for people", "nothing")
    early = [
        one
        for _, one in stage.manager.history[spec.uid]
        if one.health == _UNHEALTHY and one.consecutive_failures <= 2
    ]
    demand(not early, "not UNHEALTHY with 2 failures", early and specs.told(early[0]))
    # 200 is not what is expected.
    await stage.ask(status, "answer/204")
    status = await stage.become(spec, _HEALTHY)
    demand(status.consecutive_failures == 0, "a success that clears the count", status.consecutive_failures)


@check("8.2")
async def initial_delay(stage: Stage) -> None:
    """No probe during initial_delay."""
    delay_ms = 2_000
    spec = stage.spec(health_check=specs.health_check(initial_delay_ms=delay_ms))
    await stage.running(spec)
    began_s = time.monotonic()
    status = await stage.become(spec, _HEALTHY)
    took_s = time.monotonic() - began_s
    # RUNNING may have been told late.
    demand(took_s > delay_ms / 1000 - 0.7, f"HEALTHY not before {delay_ms} ms", f"after {took_s:.1f} s")
    probes = (await stage.ask(status))["probes"]
    demand(probes and probes[0] > 0.5, "the first probe after the delay", probes[:3])


@check("8.2")
async def probes_during_the_delay(stage: Stage) -> None:
    """With probe_during_initial_delay a success counts at once, and a failure does not."""
    check = specs.health_check(initial_delay_ms=600_000, probe_during_initial_delay=True, max_retries=1)
    spec = stage.spec(health_check=check, environ={"ANSWER": "503"})
    status = await stage.running(spec)
    # Ten intervals: more than enough failures, if they counted.
    await asyncio.sleep(2.0)
    newest = stage.manager.statuses[spec.uid]
    demand(newest.health != _UNHEALTHY, "no failure to count during the delay", specs.told(newest))
    await stage.ask(status, "answer/200")
    await stage.become(spec, _HEALTHY)


@check("8.3")
async def health_by_port(stage: Stage) -> None:
    """Without a health check a kernel is HEALTHY as soon as its port accepts, and not before."""
    spec = stage.spec(environ={"WAIT_S": "2"})
    await stage.running(spec)
    began_s = time.monotonic()
    status = await stage.become(spec, _HEALTHY)
    took_s = time.monotonic() - began_s
    demand(took_s > 1.2, "HEALTHY when it listens, 2 s after its start", f"HEALTHY after {took_s:.1f} s")
    await stage.ask(status)


@check("8.4")
async def reachable(stage: Stage) -> None:
    """The kernel serves at the host and port of its status, and two kernels have ports of their own."""
    first, second = stage.spec(), stage.spec()
    statuses = [await stage.healthy(first), await stage.healthy(second)]
    demand(statuses[0].port != statuses[1].port, "ports of their own", statuses[0].port)
    for spec, status in zip((first, second), statuses, strict=True):
        environ = (await stage.ask(status))["environ"]
        demand(environ["DURE_KERNEL_UID"] == spec.uid, "the kernel itself behind its port", "another one")


CHECKS = (reachable, health_check, initial_delay, probes_during_the_delay, health_by_port)
