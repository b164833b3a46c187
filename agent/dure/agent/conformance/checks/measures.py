"""What kernels use."""

from __future__ import annotations

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import Failed, NotApplicable, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_INTERVAL_MS, _DEFAULT_MS = 500, 5_000
_ROUNDS = 5


@check("12.1")
async def measurements(stage: Stage) -> None:
    """A kernel that computes is seen to: cpu and memory, by the names and units of the protocol."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    _every(stage, _INTERVAL_MS)
    try:
        await stage.ask(status, "burn/20")
        await stage.until(
            lambda: _newest(stage, spec.uid, "cpu_used") > 0.2,
            "cpu_used above 0.2 cores of a kernel that computes",
            lambda: _told(stage, spec.uid),
        )
        values = stage.manager.measured[spec.uid][-1][1]
    finally:
        _every(stage, _DEFAULT_MS)
    demand("mem" in values, "`mem`", sorted(values))
    demand(2**20 < values["mem"] < 2**31, "`mem` in bytes, of a small program", values["mem"])
    granted = spec.slots["mem"] / 1000
    demand(abs(values["mem_util"] - values["mem"] * 100 / granted) < 1, "`mem_util` in percent", values)
    # One core was granted, so percent of the grant are hundredths of a core.
    demand(abs(values["cpu_util"] - values["cpu_used"] * 100) < 1, "`cpu_util` in percent", values)
    wrong = {name: value for name, value in values.items() if not value >= 0}
    demand(not wrong, "no negative value", wrong)


@check("12.2", alone=True)
async def measure_interval(stage: Stage) -> None:
    """MeasureInterval says how often kernels are measured."""
    spec = stage.spec()
    await stage.healthy(spec)
    _every(stage, _INTERVAL_MS)
    try:
        rounds = stage.manager.measured[spec.uid]
        first = len(rounds)
        await stage.until(
            lambda: len(rounds) > first + _ROUNDS,
            f"measurements every {_INTERVAL_MS} ms",
            lambda: f"{len(rounds) - first} of them",
        )
    finally:
        _every(stage, _DEFAULT_MS)
    times = [at_s for at_s, _ in rounds][-_ROUNDS:]
    apart_s = (times[-1] - times[0]) / (len(times) - 1)
    if not 0.3 < apart_s < 1.5:
        raise Failed(f"measurements {_INTERVAL_MS} ms apart", f"{apart_s:.1f} s apart")
    if not rounds[-1][1]:
        raise NotApplicable("the agent measures nothing of a kernel")


def _every(stage: Stage, interval_ms: int) -> None:
    interval = fleet_pb2.MeasureInterval(interval_ms=interval_ms)
    stage.manager.send(fleet_pb2.ConnectResponse(measure_interval=interval))


def _newest(stage: Stage, uid: str, name: str) -> float:
    rounds = stage.manager.measured[uid]
    return rounds[-1][1].get(name, 0.0) if rounds else 0.0


def _told(stage: Stage, uid: str) -> str:
    rounds = stage.manager.measured[uid]
    return (
        f"{rounds[-1][1]}" if rounds else f"no measurement of {specs.told(stage.manager.statuses.get(uid))}"
    )


CHECKS = (measurements, measure_interval)
