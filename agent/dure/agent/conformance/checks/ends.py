"""How kernels end: by themselves, by their limits, or because they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from pathlib import Path
from signal import SIGKILL

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.outcome import Failed, NotApplicable, demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

_EAT = """
kept = []
for _ in range(100):
    kept.append(bytearray(b"x" * 4000000))
print("it has 400 MB")
"""
_BURN = """
import time
wall, cpu = time.monotonic(), time.process_time()
while time.monotonic() - wall < 2:
    pass
print((time.process_time() - cpu) / (time.monotonic() - wall))
"""


@check("3.3")
async def exit_code(stage: Stage) -> None:
    """A kernel that ends by itself is EXITED, with its code, a message and the end of its log."""
    status = await stage.exited(stage.spec("echo to stdout; sleep 0.3; echo the last words >&2; exit 42"))
    end = status.exit
    demand((end.reason, end.code) == ("EXITED", 42), "EXITED with code 42", specs.told(status))
    demand(
        end.log_tail.splitlines() == ["to stdout", "the last words"], "both lines in log_tail", end.log_tail
    )
    demand(end.message, "a message for people", "none")
    demand(status.pid == 0, "no pid", status.pid)


@check("3.3")
async def log_tail_in_bounds(stage: Stage) -> None:
    """The end of a long log is at most 4 KiB, and it is the end."""
    line = 'i=0; while [ $i -lt 2000 ]; do echo "line $i"; i=$((i+1)); done; exit 3'
    tail = (await stage.exited(stage.spec(line))).exit.log_tail
    demand(500 < len(tail.encode()) <= 4096, "at most 4096 bytes", f"{len(tail.encode())} bytes")
    demand(tail.rstrip("\n").endswith("line 1999"), "the last line at its end", tail[-60:])


@check("3.3")
async def signal(stage: Stage) -> None:
    """One that a signal ended is SIGNALED, with 128 and the signal's number."""
    spec = stage.spec()
    await stage.ask(await stage.healthy(spec), "signal/9")
    status = await stage.end(spec)
    end = status.exit
    demand((end.reason, end.code) == ("SIGNALED", 137), "SIGNALED with code 137", specs.told(status))


@check("3.3")
async def command_not_found(stage: Stage) -> None:
    """A program that does not exist fails the start: START_FAILED, with its name."""
    status = await stage.refused(stage.spec(["/no/such/program"]), "START_FAILED")
    demand("/no/such/program" in status.exit.message, "the program in the message", status.exit.message)


@check("6.6")
async def out_of_memory(stage: Stage) -> None:
    """Who uses more memory than was granted is ended, and OOM is the reason."""
    slots = {"cpu": 1000, "mem": 64 * 2**20 * 1000}
    status = await stage.exited(stage.spec(["python3", "-c", _EAT], slots=slots))
    if status.exit.reason != "OOM":
        stage.not_if_said("memory")
        raise Failed("OOM of 400 MB in 64 MiB", specs.told(status))


@check("6.6")
async def cpu_limit(stage: Stage) -> None:
    """Half a core is half a core."""
    slots = {"cpu": 500, "mem": specs.MEMORY_BYTES * 1000}
    status = await stage.exited(stage.spec(["python3", "-c", _BURN], slots=slots))
    demand(status.exit.code == 0, "EXITED with code 0", specs.told(status))
    used = float(status.exit.log_tail)
    if used > 0.7:
        stage.not_if_said("cpu")
        raise Failed("at most half of a core", f"{used:.2f} cores")


@check("4.7")
async def stop_with_grace(stage: Stage) -> None:
    """A removal sends SIGTERM; who heeds it is gone before the grace is over, with its last words kept."""
    line = "trap 'echo goodbye; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    spec = stage.spec(line, stop_grace_ms=15_000)
    await stage.running(spec)
    await stage.said(spec.uid, "ready")
    began_s = time.monotonic()
    await stage.gone(spec.uid)
    took_s = time.monotonic() - began_s
    demand(took_s < 10, "GONE before its grace of 15 s is over", f"after {took_s:.1f} s")
    said = [line for _, line in (await stage.log(spec.uid)).lines]
    demand("goodbye" in said, "SIGTERM to reach it, and what it said then", said[-3:])


@check("4.7")
async def stop_by_force(stage: Stage) -> None:
    """Who ignores SIGTERM is killed when its grace is over, and not before."""
    spec = stage.spec(environ={"DEAF": "1"}, stop_grace_ms=1_500)
    await stage.healthy(spec)
    began_s = time.monotonic()
    await stage.gone(spec.uid)
    took_s = time.monotonic() - began_s
    demand(1.3 < took_s < 10, "GONE soon after its grace of 1.5 s", f"after {took_s:.1f} s")


@check("4.7")
async def nothing_is_left(stage: Stage) -> None:
    """With the kernel go all of its processes, also those that left its session."""
    mark = str(10**6 + uuid.uuid4().int % 10**9)
    escape = f"import os, time; os.setsid(); os.execvp('sleep', ['sleep', '{mark}'])"
    line = f"(trap '' TERM; python3 -c \"{escape}\" &); exec sleep 3600"
    spec = stage.spec(line, stop_grace_ms=500)
    await stage.running(spec)
    deadline_s = time.monotonic() + 5
    while not _named(mark):
        if time.monotonic() > deadline_s:
            raise NotApplicable("the kernel's processes cannot be seen from here")
        await asyncio.sleep(0.1)
    await stage.gone(spec.uid)
    left = _named(mark)
    for pid in left:
        # Ours, and nobody else would end it.
        with contextlib.suppress(OSError):
            os.kill(pid, SIGKILL)
    demand(not left, "no process of the kernel after GONE", f"processes {left}")


@check("3.3")
async def exited_is_kept(stage: Stage) -> None:
    """An end is reported until the kernel is removed, and then it is GONE."""
    spec = stage.spec("exit 5")
    await stage.exited(spec)
    status = await stage.gone(spec.uid)
    seen = [one for _, one in stage.manager.history[spec.uid] if one.phase == fleet_pb2.KERNEL_PHASE_EXITED]
    demand({one.exit.code for one in seen} == {5}, "code 5 in every report", [one.exit.code for one in seen])
    demand(status.phase == fleet_pb2.KERNEL_PHASE_GONE, "GONE", specs.told(status))


def _named(mark: str) -> list[int]:
    """Processes of this machine that sleep for that long."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[1:2] == [mark.encode()] and arguments[0].endswith(b"sleep"):
            found.append(int(folder.name))
    return found


CHECKS = (
    exit_code,
    log_tail_in_bounds,
    signal,
    command_not_found,
    out_of_memory,
    cpu_limit,
    stop_with_grace,
    stop_by_force,
    nothing_is_left,
    exited_is_kept,
)
