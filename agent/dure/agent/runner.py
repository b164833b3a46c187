"""One kernel on this node, from its spec to its end: prepares, starts, follows, probes and removes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dure.agent import clusters, health, ports, prober
from dure.agent.backends import outcome
from dure.agent.backends.base import (
    Ended,
    Handle,
    Observation,
    StartFailed,
)
from dure.agent.backends.outcome import without_message
from dure.agent.health import Health, Policy
from dure.agent.kernel import Event
from dure.agent.node import Node
from dure.agent.preparation import Preparation
from dure.agent.prober import Answer
from dure.agent.shim.files import read_json, write_bytes, write_json
from dure.agent.starts import Start
from dure.fleet.v1 import fleet_pb2
from dure.wire.backoff import backoff_s

LOG_TAIL_BYTES = 4096
_log = logging.getLogger(__name__)


class Runner:
    """Runs one kernel. `emit` is told of events, or None when only the status changed."""

    def __init__(
        self,
        node: Node,
        spec: fleet_pb2.KernelSpec,
        handle: Handle,
        others: Callable[[], Iterable[Sequence[fleet_pb2.DeviceGrant]]],
        emit: Callable[[Event | None], None],
    ) -> None:
        self.spec = spec
        self.handle = handle
        self.ended = False
        self._node = node
        self._others = others
        self._emit = emit
        self._files = str(handle.folder)
        self._policy = _policy_of(spec)
        self._health = health.begin(self._policy)
        self._start: Start | None = None
        self.status = fleet_pb2.KernelStatus(uid=spec.uid, host=node.host)

    def save(self) -> None:
        """Keeps the spec, so that the next agent knows this kernel."""
        self.handle.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(f"{self._files}/spec.pb", self.spec.SerializeToString())

    async def run(self) -> None:
        """Starts it, or goes on where the agent before stopped, until it ended."""
        try:
            adopted = await self._adopt()
            if not adopted:
                self._start = Start(self._node.counts, self._node.tracing, self.spec)
                await self._prepare()
            await self._follow(adopted and (self.handle.folder / "verdict.json").exists())
        except StartFailed as error:
            self._fail(error.reason, str(error))
        except ports.NoPort as error:
            self._fail("PORT_FAILED", str(error))
        except Exception as error:
            # The top of this kernel's task: it must not stay for ever in a phase that it is not in.
            _log.exception("kernel %s broke", self.spec.uid)
            with contextlib.suppress(OSError):
                await self._node.backend.stop(self.handle, 0)
            reason = (
                error.strerror if isinstance(error, OSError) and error.strerror else "see the agent's log"
            )
            self._fail("START_FAILED", f"the node could not run it: {reason}")
        finally:
            self._start_over("was told to go before its command ran")

    def _start_over(self, error: str = "") -> None:
        if self._start is not None:
            self._start.over(error)
            self._start = None

    async def stop(self, grace_s: float) -> None:
        """Ends it and frees what it used, but keeps its folder and with it how it ended."""
        await self._node.backend.stop(self.handle, grace_s)
        if not (self.handle.folder / "exit.json").exists():
            self._node.backend.write_exit(
                self.handle, Ended("LOST", -1, "its agent was stopped before it started")
            )
        await self._node.backend.clean(self.handle)

    async def condemn(self, ended: Ended) -> None:
        """Ends it for a reason of the node's own, which stands in its report in place of what its end looks
        like; also if the agent is killed meanwhile. Raises OSError, or TimeoutError."""
        verdict = {
            "reason": ended.reason,
            "code": ended.code,
            "message": ended.message,
            "stopped": ended.by_wish,
        }
        write_json(f"{self._files}/verdict.json", verdict)
        await self._node.backend.stop(self.handle, self.grace_s)

    def show_enforcement(self, mode: str, detail: str) -> None:
        """What was verified to keep it within its parts of devices, and why it is no better."""
        detail = detail[:1000]
        if (self.status.enforcement, self.status.enforcement_detail) != (mode, detail):
            self.status.enforcement, self.status.enforcement_detail = mode, detail
            self._emit(None)

    async def remove(self) -> None:
        """Ends it and leaves nothing behind. Goes on until that is done."""
        try:
            await self._remove()
        finally:
            self._node.serial.over(self.spec.uid)

    async def _remove(self) -> None:
        attempt = 0
        while True:
            try:
                if self.handle.folder.exists():
                    await self._node.backend.stop(self.handle, self.grace_s)
                    await self._node.backend.clean(self.handle)
                    await self._node.leases.release(self.handle.folder)
                    await self._keep_log()
                    await asyncio.to_thread(_remove_folder, self.handle.folder)
                return
            except (OSError, TimeoutError) as error:
                attempt += 1
                _log.warning("kernel %s resists its removal: %s", self.spec.uid, error)
                self._say(f"cannot be removed yet: {error}")
                await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    async def _keep_log(self) -> None:
        try:
            await asyncio.to_thread(self._node.logs.keep, self.spec.uid, self.handle.folder)
        except OSError as error:
            # Its log is lost; the kernel must go nevertheless.
            _log.warning("the log of kernel %s cannot be kept: %s", self.spec.uid, error)

    @property
    def grace_s(self) -> float:
        return self.spec.stop_grace_ms / 1000

    async def _adopt(self) -> bool:
        if not await self._node.backend.adopt(self.handle):
            return False
        self._node.serial.hold(self.spec)
        known = read_json(f"{self._files}/kernel.json") or {}
        self.status.port = int(known.get("port", 0))
        return True

    async def _prepare(self) -> None:
        await self._node.backend.prepare(self.handle, self.spec)
        preparation = Preparation(self._node, self.spec, self.handle, self._say)
        plan = await preparation.plan(self._others())
        if plan.container is None or plan.container.shares_network:
            self.status.port = plan.port
            write_json(f"{self._files}/kernel.json", {"port": plan.port})
        await self._node.serial.take(self.spec, self._say)
        self._say("starting")
        await self._node.backend.start(plan, self._tell)

    async def _follow(self, condemned: bool) -> None:
        """`condemned`: the agent before began to end it."""
        seen: Observation | None = None
        probing: asyncio.Task[None] | None = None
        ending = asyncio.create_task(self._go_on_ending()) if condemned else None
        started = False
        try:
            while True:
                seen = await self._node.backend.wait(self.handle, seen)
                self.status.pid = seen.pid
                if seen.port and seen.port != self.status.port:
                    self.status.port = seen.port
                    await self._node.leases.claim(self.handle.folder, seen.port)
                self.status.message = seen.message
                if seen.ended is not None:
                    self._end(seen.ended)
                    return
                if not seen.started_at_s or started:
                    self._emit(None)
                    continue
                started = True
                self._start_over()
                self._node.serial.began(self.spec, prober.now_s() - seen.started_at_s)
                if clusters.is_probed(self.spec):
                    self._resume_health(seen.started_at_s)
                    probing = asyncio.create_task(self._probe(seen.started_at_s))
                self._emit(Event.STARTED)
        finally:
            running = [task for task in (probing, ending) if task is not None]
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def _go_on_ending(self) -> None:
        attempt = 0
        while True:
            try:
                await self._node.backend.stop(self.handle, self.grace_s)
                return
            except (OSError, TimeoutError) as error:
                attempt += 1
                _log.warning("kernel %s resists its end: %s", self.spec.uid, error)
                await asyncio.sleep(backoff_s(attempt, first_s=0.2, max_s=5.0, jitter=0.0))

    async def _probe(self, started_at_s: float) -> None:
        attempt = 0
        while True:
            try:
                await prober.probe_on(
                    self._node.http, self._target(), self._policy, self._health, started_at_s, self._record
                )
            except Exception:
                attempt += 1
                _log.exception("probing of kernel %s broke; beginning again", self.spec.uid)
                await asyncio.sleep(backoff_s(attempt, first_s=1.0, max_s=30.0, jitter=0.0))

    def _target(self) -> prober.Target:
        check = self.spec.health_check
        return prober.Target(
            self._node.host, self.status.port, check.path, check.expected_status_code or 200, self._complaint
        )

    async def _complaint(self) -> str:
        return await self._node.backend.complaint(self.handle, self._node.host, self.status.port)

    def _record(self, current: Health, answer: Answer) -> None:
        self._node.counts.probes.add("success" if answer.success else "failure")
        before = (self.status.health, self.status.consecutive_failures, self.status.probe_detail)
        self._health = current
        if current.state is health.State.HEALTHY:
            self._node.serial.over(self.spec.uid)
        self.status.health = fleet_pb2.KernelHealth.ValueType(current.state.value)
        self.status.consecutive_failures = current.failures
        self.status.probe_status_code = answer.status_code
        self.status.probe_detail = answer.detail
        if before != (self.status.health, current.failures, answer.detail):
            kept: dict[str, Any] = {
                "state": current.state.value,
                "failures": current.failures,
                "status_code": answer.status_code,
                "detail": answer.detail,
            }
            write_json(f"{self._files}/health.json", kept)
            self._emit(None)

    def _resume_health(self, started_at_s: float) -> None:
        kept = read_json(f"{self._files}/health.json") or {
            "state": health.State.DEGRADED.value,
            "failures": 0,
            "status_code": 0,
            "detail": "",
        }
        elapsed_s = prober.now_s() - started_at_s
        self._health = health.resume(self._policy, health.State(kept["state"]), kept["failures"], elapsed_s)
        if self._health.state is health.State.HEALTHY:
            self._node.serial.over(self.spec.uid)
        self.status.health = fleet_pb2.KernelHealth.ValueType(kept["state"])
        self.status.consecutive_failures = kept["failures"]
        self.status.probe_status_code = kept["status_code"]
        self.status.probe_detail = kept["detail"]

    def _fail(self, reason: str, message: str) -> None:
        ended = Ended(reason, -1, message)
        if not (self.handle.folder / "exit.json").exists():
            self._node.backend.write_exit(self.handle, ended)
        self._end(ended)

    def _end(self, ended: Ended) -> None:
        verdict = read_json(f"{self._files}/verdict.json")
        if verdict is not None:
            ended = outcome.read(verdict)
        self.ended = True
        self._node.serial.over(self.spec.uid)
        self.status.ClearField("pull")
        self._node.counts.ends.add(ended.reason)
        self._start_over(ended.message or ended.reason)
        self.status.pid = 0
        self.status.exit.CopyFrom(
            fleet_pb2.KernelExit(
                reason=ended.reason,
                code=ended.code,
                log_tail=without_message(
                    self._node.backend.log_tail(self.handle, LOG_TAIL_BYTES), ended.message
                ),
                message=ended.message[:4000],
            )
        )
        self.status.message = ended.message[:4000]
        self._emit(Event.ENDED)

    def _say(self, message: str) -> None:
        self._tell(message, None)

    def _tell(self, message: str, pull: fleet_pb2.ImagePull | None) -> None:
        self.status.message = message
        self.status.ClearField("pull")
        if pull is not None:
            self.status.pull.CopyFrom(pull)
        self._emit(None)


def _policy_of(spec: fleet_pb2.KernelSpec) -> Policy | None:
    if not spec.HasField("health_check"):
        return None
    check = spec.health_check
    return Policy(
        # A schedule of zero would be a busy loop; the manager never sends one.
        interval_s=max(check.interval_ms, 10) / 1000,
        max_retries=check.max_retries,
        max_wait_s=max(check.max_wait_time_ms, 10) / 1000,
        initial_delay_s=check.initial_delay_ms / 1000,
        probe_during_initial_delay=check.probe_during_initial_delay,
    )


def _remove_folder(folder: Path) -> None:
    def grant(function: Callable[..., Any], path: str, error: Any) -> None:
        # A session may have taken away its own rights on folders below its home.
        os.chmod(os.path.dirname(path), 0o700)
        function(path)

    # The spec goes last: as long as it stands, the next agent takes the kernel up.
    for below in folder.iterdir():
        if below.name == "spec.pb":
            continue
        if below.is_dir() and not below.is_symlink():
            shutil.rmtree(below, onerror=grant)
        else:
            below.unlink()
    shutil.rmtree(folder, onerror=grant)
