"""Sees to it, round for round, that kernels stay within their parts of devices, and tells what keeps them.

It looks at all kernels at once, after the driver told who holds what. What a round cannot tell, because the
driver or the back end does not answer, it leaves as it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dure.agent.accelerators import Found
from dure.agent.backends.base import Backend, Ended
from dure.agent.enforcement import Held, Seen, choice
from dure.agent.enforcement.choice import Choice, Standing
from dure.agent.enforcement.modes import Modes
from dure.agent.runner import Runner
from dure.agent.waiting import Background
from dure.fleet.v1 import fleet_pb2
from dure.wire.enforcement import MPS, NONE

# A back end that hangs takes no longer than this, for all kernels.
PROCESSES_LIMIT_S, JUDGE_LIMIT_S = 2.0, 4.0
ASKED_AT_ONCE_MAX = 8
NOT_IN_TIME = "its processes could not be looked at in time"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Case:
    """A kernel of a round. `unknown` names devices of it that are not on the node, `silent` those that do not
    tell who holds their memory, `healthy` says that all are there and answer."""

    runner: Runner
    held: Held
    prepared: Choice
    pids: frozenset[int]
    unknown: tuple[str, ...]
    silent: tuple[str, ...]
    healthy: bool


def _seen(case: _Case, found: Found) -> Seen:
    memory = {
        device: {pid: used for pid, used in by_pid.items() if pid in case.pids}
        for device, by_pid in found.memory.items()
    }
    sharing = frozenset().union(*found.mps.values()) if found.mps else frozenset()
    return Seen(case.pids, memory, sharing & case.pids)


def _by_use(modes: Modes) -> frozenset[str]:
    return frozenset(name for name, mode in modes.all.items() if mode.by_use)


class Guard:
    """`kernels` are those that were told to run and have not ended, None if they are not known yet;
    `condemn` begins to end one, and is called again as long as it runs; `devices` are those of the node."""

    def __init__(
        self,
        modes: Modes,
        backend: Backend,
        devices: Mapping[str, fleet_pb2.Device],
        kernels: Callable[[], Sequence[Runner] | None],
        condemn: Callable[[str, Ended], None],
    ) -> None:
        self._modes = modes
        self._backend = backend
        self._devices = devices
        self._kernels = kernels
        self._condemn = condemn
        self._judging = Background("guard")
        self._short_since_s: dict[str, float] = {}

    async def look(self, found: Found) -> tuple[str, ...]:
        """One round; `found` is what the driver told last. Within a few seconds, whatever hangs. Answers what
        the node lacks to keep kernels within their parts, for people."""
        await self._modes.assess(found)
        if self._kernels() is not None:
            await self._look(found)
        return self._modes.limitations

    async def _look(self, found: Found) -> None:
        cases = await self._cases(found)
        seen = [_seen(case, found) for case in cases]
        in_time = True
        try:
            read = await self._judging.run(
                lambda: [self._read(case, one) for case, one in zip(cases, seen, strict=True)], JUDGE_LIMIT_S
            )
        except TimeoutError:
            # A process that hangs within the kernel takes who reads its maps along. The watchdog goes on.
            read, in_time = [dict.fromkeys(_by_use(self._modes), NOT_IN_TIME) for _ in cases], False
        now_s = time.monotonic()
        for case, one, answers in zip(cases, seen, read, strict=True):
            if case.runner.ended:
                continue
            standing = self._standing(case, one, answers)
            if case.pids and case.runner.spec.devices:
                case.runner.show_enforcement(standing.mode, standing.detail)
            ended = self._exceeded(case, one) or self._missed(case, standing, in_time, now_s)
            if ended is not None:
                self._condemn(case.runner.spec.uid, ended)
        await self._forget()

    async def _cases(self, found: Found) -> list[_Case]:
        """Kernels that have devices, and, if somebody else uses a GPU, those that have none."""
        runners = self._kernels() or ()
        pids = await self._processes([runner for runner in runners if runner.spec.devices])
        ours = frozenset().union(*pids.values()) if pids else frozenset()
        if any(used.keys() - ours for used in found.memory.values()):
            pids |= await self._processes([runner for runner in runners if not runner.spec.devices])
        return [
            self._case(runner, pids[runner.spec.uid], found) for runner in runners if runner.spec.uid in pids
        ]

    def _case(self, runner: Runner, pids: frozenset[int], found: Found) -> _Case:
        granted = [grant.device for grant in runner.spec.devices]
        known = [self._devices[device] for device in granted if device in self._devices]
        return _Case(
            runner,
            self._modes.held(runner.spec, runner.handle),
            self._modes.prepared(runner.handle),
            pids,
            tuple(device for device in granted if device not in self._devices),
            tuple(device for device in granted if device not in found.memory),
            len(known) == len(granted) and all(device.healthy for device in known),
        )

    async def _processes(self, runners: Sequence[Runner]) -> dict[str, frozenset[int]]:
        """By kernel; those for which it cannot be told in time are left out."""
        seen: dict[str, frozenset[int]] = {}
        at_once = asyncio.Semaphore(ASKED_AT_ONCE_MAX)

        async def ask(runner: Runner) -> None:
            async with at_once:
                try:
                    seen[runner.spec.uid] = await self._backend.processes(runner.handle)
                except OSError as error:
                    _log.warning("the processes of kernel %s cannot be told: %s", runner.spec.uid, error)

        tasks = [asyncio.create_task(ask(runner)) for runner in runners]
        if tasks:
            try:
                await asyncio.wait(tasks, timeout=PROCESSES_LIMIT_S)
            finally:
                for task in tasks:
                    task.cancel()
        return dict(seen)

    def _read(self, case: _Case, seen: Seen) -> dict[str, str]:
        """In a thread: what the mode says that the kernel was prepared for, if that is told by processes."""
        mode = case.prepared.mode
        if mode not in _by_use(self._modes) or case.unknown:
            return {}
        if case.silent:
            return {mode: f"the driver does not tell which processes use {', '.join(case.silent)}"}
        problem = self._modes.all[mode].verify(case.held, seen)
        return {mode: problem or ("" if seen.using else choice.NOT_USED_YET)}

    def _standing(self, case: _Case, seen: Seen, read: Mapping[str, str]) -> Standing:
        answers = []
        for mode in choice.below(case.prepared.mode, self._modes.watches):
            if mode != NONE and case.unknown:
                answers.append((mode, f"{', '.join(case.unknown)} is not on this node now"))
            else:
                answers.append(
                    (mode, read[mode] if mode in read else self._modes.all[mode].verify(case.held, seen))
                )
        return choice.standing(answers, case.prepared.why)

    def _exceeded(self, case: _Case, seen: Seen) -> Ended | None:
        """How a kernel must end that goes beyond its parts."""
        # What it was granted of a device that is not there cannot be told from what it was not.
        if not self._modes.watches or case.unknown:
            return None
        ends = [mode.watch(case.held, seen) for mode in self._modes.all.values()]
        return next((ended for ended in ends if ended is not None), None)

    def _missed(self, case: _Case, standing: Standing, in_time: bool, now_s: float) -> Ended | None:
        """How a kernel must end that has been without what it requires for too long."""
        uid, required = case.runner.spec.uid, case.runner.spec.require_enforcement
        if not case.runner.spec.devices or not case.pids:
            return None
        since_s = choice.lacking_since(
            required, standing, in_time and case.healthy, self._short_since_s.get(uid), now_s
        )
        if since_s is None:
            self._short_since_s.pop(uid, None)
            return None
        self._short_since_s[uid] = since_s
        if now_s - since_s < choice.PATIENCE_S:
            return None
        return Ended(choice.REASON, -1, choice.shortfall(required, standing.mode, standing.detail))

    async def _forget(self) -> None:
        living = {runner.spec.uid: runner for runner in self._kernels() or ()}
        self._short_since_s = {uid: at for uid, at in self._short_since_s.items() if uid in living}
        for mode in self._modes.all.values():
            mode.forget(frozenset(living))
        through_mps = {
            grant.device
            for runner in living.values()
            if runner.spec.devices and self._modes.prepared(runner.handle).mode == MPS
            for grant in runner.spec.devices
        }
        await self._modes.retire({MPS: through_mps})
