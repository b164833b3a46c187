"""Runs the steps that `kernel` decides, and keeps the status of every kernel for the link to send."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from dure.agent.backends.base import Ended, Handle
from dure.agent.kernel import Action, Event, Kernels, Phase, Step
from dure.agent.node import Node
from dure.agent.runner import Runner
from dure.agent.waiting import watched
from dure.fleet.v1 import fleet_pb2

# More than any node runs: a manager that sends more is out of its mind, and must not fill this one's memory.
KERNELS_MAX = 10_000
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_log = logging.getLogger(__name__)


class Supervisor:
    """All kernels of this agent. Lives on one event loop; `changed` is set when statuses wait to be sent."""

    def __init__(self, home: Path, node: Node) -> None:
        self._folder = home / "kernels"
        self._node = node
        self._kernels = Kernels()
        self._runners: dict[str, Runner] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Ends for reasons of the node's own that are under way.
        self._ends: dict[str, asyncio.Task[None]] = {}
        # Uids whose status was not sent yet: as many as there are kernels and fresh tombstones, at most.
        self._unsent: dict[str, None] = {}
        self._snapshot: fleet_pb2.Desired | None = None
        self._adopted = False
        self.changed = asyncio.Event()

    async def adopt(self) -> None:
        """Takes up what the agent before left."""
        for spec in await self._find_all():
            self._kernels.adopt(spec.uid, spec.generation, Phase.PREPARING)
            self._launch(spec)
        self._adopted = True
        await self._settle()
        if self._runners:
            _log.info("adopted %d kernels", len(self._runners))

    def begin_stream(self) -> list[fleet_pb2.KernelStatus]:
        """Every kernel's status, for the report after Hello; what waited to be sent is part of it."""
        self._snapshot = None
        self._unsent.clear()
        return [self._status(uid) for uid in self._runners]

    def take_changes(self) -> list[fleet_pb2.KernelStatus]:
        """Statuses that changed since they were taken last."""
        self.changed.clear()
        uids = list(self._unsent)
        self._unsent.clear()
        return [self._status(uid) for uid in uids]

    def has_ended(self, uid: str) -> bool:
        """Whether a kernel writes no more to its log."""
        return uid not in self._runners or self._runners[uid].ended

    def running(self) -> list[tuple[fleet_pb2.KernelSpec, Handle]]:
        """Kernels whose command runs."""
        return [
            (runner.spec, runner.handle)
            for uid, runner in self._runners.items()
            if not runner.ended and self._kernels.phase(uid) is Phase.RUNNING
        ]

    def guarded(self) -> list[Runner] | None:
        """Kernels that were told to run and have not ended; None before those of an earlier agent were taken
        up."""
        if not self._adopted:
            return None
        phases = (Phase.PREPARING, Phase.RUNNING)
        return [
            runner
            for uid, runner in self._runners.items()
            if not runner.ended and self._kernels.phase(uid) in phases
        ]

    def held(self) -> frozenset[str]:
        """Ids of the devices that kernels have which have not ended."""
        return frozenset(
            grant.device
            for runner in self._runners.values()
            if not runner.ended
            for grant in runner.spec.devices
        )

    async def held_before(self) -> frozenset[str]:
        """Ids of the devices of kernels that the agent before left."""
        specs = await self._find_all()
        return frozenset(grant.device for spec in specs for grant in spec.devices)

    def condemn(self, uid: str, ended: Ended) -> None:
        """Begins to end a kernel for a reason of the node's own. One that resists goes on; whoever condemned
        it does so again."""
        runner = self._runners.get(uid)
        if runner is None or runner.ended or uid in self._ends:
            return

        async def end() -> None:
            try:
                await runner.condemn(ended)
            except (OSError, TimeoutError) as error:
                _log.warning("kernel %s resists its end (%s): %s", uid, ended.message, error)
            finally:
                del self._ends[uid]

        _log.warning("ending kernel %s (%s): %s", uid, runner.spec.endpoint, ended.message)
        self._ends[uid] = watched(end(), f"end of kernel {uid}")

    def phases(self) -> Counter[Phase]:
        """How many kernels are in each phase."""
        return Counter(entry.phase for entry in self._kernels.entries.values())

    def apply(self, desired: fleet_pb2.Desired) -> None:
        """Takes in a message of the manager; a snapshot counts once it is complete."""
        specs = {spec.uid: spec for spec in desired.kernels if _is_fine(spec.uid)}
        removals = {gone.uid: gone.generation for gone in desired.removals if _is_fine(gone.uid)}
        if not desired.snapshot:
            for uid, generation in removals.items():
                self._do(self._kernels.unwant(uid, generation), {})
            for uid, spec in specs.items():
                self._do(self._kernels.want(uid, spec.generation), specs)
            return
        if self._snapshot is None:
            self._snapshot = fleet_pb2.Desired()
        self._snapshot.MergeFrom(desired)
        if len(self._snapshot.kernels) > KERNELS_MAX:
            raise ValueError(f"a snapshot of more than {KERNELS_MAX} kernels")
        if not desired.complete:
            return
        specs = {spec.uid: spec for spec in self._snapshot.kernels if _is_fine(spec.uid)}
        removals = {gone.uid: gone.generation for gone in self._snapshot.removals if _is_fine(gone.uid)}
        self._snapshot = None
        wanted = {uid: spec.generation for uid, spec in specs.items()}
        self._do(self._kernels.snapshot(wanted, removals), specs)

    async def detach(self) -> None:
        """Lets go of all kernels; they keep running."""
        await _cancel([*self._ends.values(), *self._tasks.values()])

    async def stop_all(self) -> None:
        """Ends all kernels, each with its grace, and keeps how they ended."""
        await _cancel([*self._ends.values(), *self._tasks.values()])
        results = await asyncio.gather(
            *(runner.stop(runner.grace_s) for runner in self._runners.values()), return_exceptions=True
        )
        for runner, result in zip(self._runners.values(), results, strict=True):
            if isinstance(result, BaseException):
                _log.error("kernel %s could not be stopped cleanly: %s", runner.spec.uid, result)

    async def stop_found(self) -> int:
        """Ends what the agent before left, without taking it up: nothing is started for it. Answers how
        many."""
        for spec in await self._find_all():
            runner = self._runner(spec)
            runner.save()
            await self._node.backend.adopt(runner.handle)
            self._runners[spec.uid] = runner
        ran = {
            runner.spec.session_uid
            for runner in self._runners.values()
            if not (runner.handle.folder / "exit.json").exists()
        }
        await self.stop_all()
        return len(ran)

    async def _find_all(self) -> list[fleet_pb2.KernelSpec]:
        """What the agent's folder knows of, and what the back end does beside."""
        found = {spec.uid: spec for spec in await asyncio.to_thread(self._find)}
        for spec in await self._node.backend.find():
            if spec.uid not in found and _is_fine(spec.uid):
                _log.warning("kernel %s is there, but not in the agent's folder", spec.uid)
                found[spec.uid] = spec
        return list(found.values())

    def _find(self) -> list[fleet_pb2.KernelSpec]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[fleet_pb2.KernelSpec] = []
        for folder in sorted(self._folder.iterdir()):
            try:
                spec = fleet_pb2.KernelSpec.FromString((folder / "spec.pb").read_bytes())
            except (FileNotFoundError, DecodeError):
                spec = fleet_pb2.KernelSpec()
            if spec.uid == folder.name:
                found.append(spec)
            else:
                # Killed at the first or the last moment of a kernel: nothing of it runs.
                shutil.rmtree(folder, ignore_errors=True)
        return found

    async def _settle(self) -> None:
        """Gives adopted kernels a moment to look at themselves, so that the first report tells the truth."""
        for _ in range(100):
            if all(self._kernels.phase(uid) is not Phase.PREPARING for uid in self._runners):
                return
            await asyncio.sleep(0.01)

    def _do(self, steps: Iterable[Step], specs: dict[str, fleet_pb2.KernelSpec]) -> None:
        for step in steps:
            if step.action is Action.START:
                self._launch(specs[step.uid])
            elif step.action is Action.REMOVE:
                self._take_away(step.uid)
            self._mark(step.uid)

    def _launch(self, spec: fleet_pb2.KernelSpec) -> None:
        runner = self._runner(spec)
        self._runners[spec.uid] = runner
        runner.save()
        self._begin(spec.uid, runner.run())

    def _runner(self, spec: fleet_pb2.KernelSpec) -> Runner:
        def others() -> list[Sequence[fleet_pb2.DeviceGrant]]:
            return [r.spec.devices for r in self._runners.values() if r.spec.uid != spec.uid and not r.ended]

        handle = Handle(spec.uid, self._folder / spec.uid)
        return Runner(self._node, spec, handle, others, self._emitter(spec.uid))

    def _take_away(self, uid: str) -> None:
        runner, before = self._runners[uid], self._tasks[uid]

        async def remove() -> None:
            await _cancel([before])
            await runner.remove()
            del self._runners[uid]
            del self._tasks[uid]
            self._do(self._kernels.saw(uid, Event.REMOVED), {})

        self._begin(uid, remove())

    def _begin(self, uid: str, coroutine: Coroutine[Any, Any, None]) -> None:
        self._tasks[uid] = watched(coroutine, f"kernel {uid}")

    def _emitter(self, uid: str) -> Callable[[Event | None], None]:
        def emit(event: Event | None) -> None:
            if event is not None:
                runner = self._runners[uid]
                _log.info(
                    "kernel %s (%s) %s %s", uid, runner.spec.endpoint, event.value, runner.status.message
                )
                self._do(self._kernels.saw(uid, event), {})
            self._mark(uid)

        return emit

    def _mark(self, uid: str) -> None:
        self._unsent[uid] = None
        self.changed.set()

    def _status(self, uid: str) -> fleet_pb2.KernelStatus:
        status = fleet_pb2.KernelStatus(uid=uid)
        if uid in self._runners:
            status.CopyFrom(self._runners[uid].status)
        status.generation = self._kernels.generation(uid)
        status.phase = fleet_pb2.KernelPhase.ValueType(self._kernels.phase(uid).value)
        return status


def _is_fine(uid: str) -> bool:
    # It becomes the name of a folder and of control groups.
    if _UID.fullmatch(uid):
        return True
    _log.error("refused a kernel: `%s` is no uid", uid[:80])
    return False


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)
