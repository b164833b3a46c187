"""Joining, the stream, and what comes after it broke."""

from __future__ import annotations

import asyncio
import itertools
import re
import time

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.manager import HEARTBEAT_MS
from dure.agent.conformance.outcome import Failed, demand
from dure.agent.conformance.stage import RECONNECT_LIMIT_S, Stage
from dure.fleet.v1 import fleet_pb2

_SLOT_WORDS = ("cuda.shares", "cuda.device")
_MODES = ("mig", "mps", "hook", "watchdog", "none", "")
_BEATS = 5


@check("1.1")
async def join(stage: Stage) -> None:
    """The agent joined once, with its join token, under its name."""
    joins = stage.manager.joins
    demand(joins == [stage.name], f"one Join of `{stage.name}`", f"Joins of {joins}")


@check("1.2", alone=True)
async def identity_is_kept(stage: Stage) -> None:
    """Started again, it comes with the credential that it has, and does not join again."""
    before = len(stage.manager.joins)
    await stage.restart()
    demand(len(stage.manager.joins) == before, "no second Join", f"{len(stage.manager.joins)} Joins")
    broken = [sentence for rule, sentence in stage.manager.broken_rules if rule == "1.2"]
    demand(not broken, "the credential with every call", "; ".join(broken))


@check("2.2")
async def hello(stage: Stage) -> None:
    """Hello makes sense: versions, slots, host, devices, profiles."""
    said = stage.hello
    demand(said.protocol_version >= 1, "a protocol_version of at least 1", said.protocol_version)
    for name in ("backend", "host_id", "boot_id", "architecture", "resource_group"):
        demand(getattr(said, name), f"`{name}` to be set", "nothing")
    for slot in ("cpu", "mem"):
        demand(said.slots[slot] > 0, f"a positive slot `{slot}`", said.slots[slot])
    # In milli-units a mistake of a thousand is easily made.
    demand(said.slots["mem"] >= 2**26 * 1000, "`mem` in thousandths of a byte", said.slots["mem"])
    demand(said.slots["cpu"] <= 100_000 * 1000, "`cpu` in thousandths of a core", said.slots["cpu"])
    profiles = list(said.security_profiles)
    unset = fleet_pb2.SECURITY_PROFILE_UNSPECIFIED
    demand(unset not in profiles, "security profiles that are profiles", profiles)
    demand(all(one.strip() for one in said.limitations), "limitations that are sentences", said.limitations)


@check("2.3")
async def devices(stage: Stage) -> None:
    """Devices have ids of their own, slots that exist, parents and peers that are there, and known modes."""
    found = stage.hello.devices
    ids = [one.id for one in found]
    demand(all(ids) and len(set(ids)) == len(ids), "an id of its own for each device", ids)
    for one in found:
        demand(one.slots, f"slots of device `{one.id}`", "none")
        for slot, amount in one.slots.items():
            demand(slot in _SLOT_WORDS and amount > 0, f"slots of {_SLOT_WORDS}", f"{slot} = {amount}")
        demand(one.accelerator, f"the accelerator of device `{one.id}`", "nothing")
        demand(one.healthy or one.detail, f"what is wrong with device `{one.id}`", "nothing")
        demand(one.enforcement in _MODES, f"a mode of {_MODES}", one.enforcement)
        demand(one.id not in [peer.id for peer in one.peers], "peers that are others", one.peers)


@check("3.1")
async def report_before_desired(stage: Stage) -> None:
    """Everything was reported, the last piece with complete = true, before anything was asked for."""
    for stream in stage.manager.streams:
        if stream.announced_s:
            demand(
                0 < stream.complete_s <= stream.announced_s,
                "Observed with complete = true after Hello, without waiting for Desired",
                "none within some seconds" if not stream.complete_s else "it came after Desired",
            )


@check("2.5")
async def heartbeats(stage: Stage) -> None:
    """Heartbeats come at the interval that Welcome gave, and count up."""
    stream = await stage.connected()
    first = len(stream.beats)
    expected = f"{_BEATS} heartbeats, {HEARTBEAT_MS} ms apart"
    began_s = time.monotonic()
    await stage.until(lambda: len(stream.beats) >= first + _BEATS, expected, lambda: f"{len(stream.beats)}")
    took_s = time.monotonic() - began_s
    due_s = HEARTBEAT_MS / 1000 * _BEATS
    demand(due_s * 0.6 < took_s < due_s * 2 + 1, expected, f"them within {took_s:.1f} s")
    numbers = [number for _, number in stream.beats]
    demand(
        all(after > before for before, after in itertools.pairwise(numbers)),
        "sequence numbers that count up",
        numbers[-_BEATS:],
    )


@check("2.6", alone=True)
async def unanswered_heartbeats(stage: Stage) -> None:
    """After three heartbeats without an answer it connects again."""
    before = await stage.connected()
    stage.manager.acknowledge = False
    try:
        await stage.until(
            lambda: before.ended_s > 0, "a stream that is given up", lambda: "it is still the same stream"
        )
    finally:
        stage.manager.acknowledge = True
    await _back(stage, before)


@check("2.6", alone=True)
async def reconnect(stage: Stage) -> None:
    """A stream that the manager ends is followed by another soon, and kernels notice nothing."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    born = (await stage.ask(status))["born"]
    before = await stage.connected()
    stage.manager.hang_up()
    await stage.manager.until(lambda: before.ended_s > 0)
    await _back(stage, before)
    await _as_before(stage, spec, status, born)


@check("2.6", alone=True)
async def manager_restart(stage: Stage) -> None:
    """A manager that was away is found soon, and kernels notice nothing."""
    spec = stage.spec()
    status = await stage.healthy(spec)
    born = (await stage.ask(status))["born"]
    before = await stage.connected()
    await stage.manager.stop()
    await asyncio.sleep(1.5)
    await stage.manager.start()
    await _back(stage, before)
    await _as_before(stage, spec, status, born)


@check("2.4", alone=True)
async def messages_in_bounds(stage: Stage) -> None:
    """No message of the whole run was out of bounds or out of place."""
    broken = [f"{sentence} (rule {rule})" for rule, sentence in stage.manager.broken_rules]
    demand(not broken, "messages as the protocol has them", "; ".join(broken))
    wrong = [uid for uid in stage.manager.history if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", uid)]
    demand(not wrong, "reports of kernels by their uids", wrong)


async def _back(stage: Stage, before: object) -> None:
    """Waits for the next stream, and its full report."""
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(RECONNECT_LIMIT_S):
            await stage.until(
                lambda: stage.manager.stream is not None and stage.manager.stream is not before,
                "a new stream with Hello",
                lambda: "none",
            )
    except TimeoutError as error:
        took_s = time.monotonic() - began_s
        raise Failed("a new stream, after a backoff of at most 1 s", f"none for {took_s:.0f} s") from error
    await stage.connected()


async def _as_before(
    stage: Stage, spec: fleet_pb2.KernelSpec, before: fleet_pb2.KernelStatus, born: str
) -> None:
    stream = await stage.connected()
    reported = specs.standing(stream.reported.get(spec.uid))
    expected = specs.standing(before)
    demand(reported == expected, f"the kernel in the full report as it was: {expected}", reported)
    # The snapshot has been sent: a kernel that stands in it is left alone.
    await asyncio.sleep(0.5)
    again = (await stage.ask(before))["born"]
    demand(again == born, "the same process behind its port", "it was started anew")


CHECKS = (
    join,
    hello,
    devices,
    report_before_desired,
    heartbeats,
    identity_is_kept,
    reconnect,
    manager_restart,
    unanswered_heartbeats,
)
# At the end of a run it knows most.
LAST = (messages_in_bounds,)
