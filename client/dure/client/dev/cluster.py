"""The programs of a development cluster: started in order, watched, stopped in order.

A dead program is reported and not restarted, so that each can be killed and started by hand. Programs that
run on the folder already (left over, or started by hand) are taken over.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dure.client.client import Client
from dure.client.context import Context, save_context
from dure.client.dev.ports import Ports
from dure.client.dev.processes import Process, find, last_lines, spawn
from dure.v1 import admin_pb2, agent_pb2
from dure.wire import identity, programs
from dure.wire.errors import DureError

START_S = 30.0
# Who starts it is told what is waited for after so long.
PATIENCE_S = 3.0
POLL_S = 0.1
COME_BACK_POLL_S = 1.0
MANAGER_STOP_S = 10.0
PROXY_STOP_S = 12.0
AGENT_STOP_S = 20.0
HURRY_S = 3.0
PROXY = "proxy-1"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run, where. `cpus` None: what each agent finds. Metrics ports are the manager's, then each
    agent's; without, they show none. `backend` runs the agents' sessions.
    """

    data_dir: Path
    ports: Ports
    agents: int
    simulated_gpus: int
    cpus: int | None = None
    metrics_ports: tuple[int, ...] = ()
    backend: str = "process"

    @property
    def manager_address(self) -> str:
        return f"127.0.0.1:{self.ports.manager}"


@dataclass(frozen=True)
class Program:
    """One program of the folder: its kind (`manager`, `agent`, `proxy`), name and own folder."""

    kind: str
    name: str
    home: Path

    def again(self, data_dir: Path) -> str:
        """The command that starts it by hand."""
        name = "" if self.kind == "manager" else f" --name {self.name}"
        return f"dure {self.kind} --data-dir {data_dir}{name}"


class StartFailed(DureError):
    """A program did not come up; the message holds the last lines of its log."""


class DevCluster:
    """Start it, await `watch` in a task, stop it; always stop it."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self.plan = plan
        self._say = say
        data_dir = plan.data_dir
        self._manager = Program("manager", "manager", programs.manager_dir(data_dir))
        self._proxy = Program("proxy", PROXY, programs.proxy_dir(data_dir, PROXY))
        self._agents = [
            Program("agent", name, programs.agent_dir(data_dir, name))
            for name in (f"agent-{number}" for number in range(1, plan.agents + 1))
        ]
        self._running: dict[str, Process] = {}
        self.context = Context(manager=plan.manager_address, api_key="")

    async def start(self, context_files: Iterable[Path]) -> None:
        """Returns once the manager answers, all agents are alive and the proxy is connected.

        Writes the context into `context_files` then. Raises StartFailed.
        """
        plan = self.plan
        self._launch(self._manager, ["--port", str(plan.ports.manager), *self._metrics(0)])
        await self._until(self._manager_answers, "the manager to answer", [self._manager])
        async with self.client() as client:
            joined = ["--manager", plan.manager_address, "--name"]
            self._launch(
                self._proxy,
                [
                    *joined,
                    self._proxy.name,
                    *("--ports", f"{plan.ports.pool[0]}-{plan.ports.pool[1]}"),
                    *("--admin-port", str(plan.ports.admin)),
                ],
                await self._join(client, admin_pb2.JOIN_ROLE_PROXY, [self._proxy]),
            )
            token = await self._join(client, admin_pb2.JOIN_ROLE_AGENT, self._agents)
            for number, agent in enumerate(self._agents, 1):
                cpus = [] if plan.cpus is None else ["--cpus", str(plan.cpus)]
                gpus = ["--simulated-gpus", str(plan.simulated_gpus)]
                backend = ["--backend", plan.backend]
                self._launch(
                    agent, [*joined, agent.name, *backend, *gpus, *cpus, *self._metrics(number)], token
                )

            async def all_there() -> bool:
                cluster = await client.admin.get_cluster()
                proxies = {proxy.name for proxy in cluster.proxies if proxy.connected}
                agents = [agent async for agent in client.agents.list()]
                alive = {agent.name for agent in agents if agent.status == agent_pb2.AGENT_STATUS_ALIVE}
                return f"proxies/{PROXY}" in proxies and alive >= {f"agents/{a.name}" for a in self._agents}

            await self._until(
                all_there, "agents and proxy to connect", [self._manager, self._proxy, *self._agents]
            )
        # Last, so that who waits for the context finds the whole cluster, every agent of it.
        for path in context_files:
            await asyncio.to_thread(save_context, path, self.context)

    def client(self) -> Client:
        """A client of this cluster; useful once it has started."""
        return Client.from_context(self.context, retry_s=START_S)

    async def agents(self) -> list[agent_pb2.Agent]:
        async with self.client() as client:
            ours = {f"agents/{agent.name}" for agent in self._agents}
            return [agent async for agent in client.agents.list() if agent.name in ours]

    async def watch(self) -> None:
        """Reports every death and every come-back; ends only when cancelled."""
        async with asyncio.TaskGroup() as group:
            for program in (self._manager, self._proxy, *self._agents):
                group.create_task(self._attend(program))

    async def stop(self, hurry: asyncio.Event) -> None:
        """Ends everything of this folder, sessions included. Setting `hurry` cuts the waits short.

        First the manager, so that it replaces nothing; then proxies, which drain; then agents, which stop
        their sessions.
        """
        self._find_all()
        await self._end([self._manager], signal.SIGTERM, MANAGER_STOP_S, hurry)
        await self._end(self._members("proxies", "proxy"), signal.SIGTERM, PROXY_STOP_S, hurry)
        agents = self._members("agents", "agent")
        await self._end(agents, signal.SIGINT, AGENT_STOP_S, hurry)
        # Of an agent that is dead, or had to be killed, the sessions run on: it has to be run to stop them.
        left = [agent for agent in agents if _has_sessions(agent) and not self._ended_well(agent)]
        for agent in left:
            self._running[agent.name] = self._spawn(agent, ["--name", agent.name, "--stop-sessions"], {})
        await self._end(left, None, AGENT_STOP_S, hurry)
        for agent in left:
            if not self._ended_well(agent):
                self._say(
                    f"sessions of {agent.name} may still run; stop them with: "
                    f"{agent.again(self.plan.data_dir)} --stop-sessions"
                )

    def _metrics(self, index: int) -> list[str]:
        ports = self.plan.metrics_ports
        return ["--metrics-port", str(ports[index])] if index < len(ports) else []

    def _launch(self, program: Program, arguments: list[str], environ: dict[str, str] | None = None) -> None:
        found = self._find(program)
        if found is not None:
            self._say(f"{program.name} runs already (pid {found.pid}): taken over as it is")
            self._running[program.name] = found
        else:
            log = programs_log(self.plan.data_dir, program.name)
            self._running[program.name] = self._spawn(
                program, [*arguments, "--log-file", str(log)], environ or {}
            )

    def _spawn(self, program: Program, arguments: list[str], environ: dict[str, str]) -> Process:
        whole = [program.kind, "--data-dir", str(self.plan.data_dir), *arguments]
        return spawn(whole, environ, _output(self.plan.data_dir, program.name))

    def _find(self, program: Program) -> Process | None:
        return find(self.plan.data_dir / "run" / f"{program.name}.pid", program.home / "lock")

    def _find_all(self) -> None:
        everyone = (self._manager, *self._members("proxies", "proxy"), *self._members("agents", "agent"))
        for program in everyone:
            known = self._running.get(program.name)
            if known is None or not known.alive:
                found = self._find(program)
                if found is not None:
                    self._running[program.name] = found

    def _members(self, folder: str, kind: str) -> list[Program]:
        place = programs.agent_dir if kind == "agent" else programs.proxy_dir
        ours = self._agents if kind == "agent" else [self._proxy]
        names = {*programs.recorded_members(self.plan.data_dir, folder), *(program.name for program in ours)}
        return [Program(kind, name, place(self.plan.data_dir, name)) for name in sorted(names)]

    async def _join(
        self, client: Client, role: admin_pb2.JoinRole.ValueType, members: list[Program]
    ) -> dict[str, str]:
        """The environment that lets `members` join; empty when all have before."""
        if all(identity.load(member.home) for member in members):
            return {}
        return {"DURE_JOIN_TOKEN": (await client.admin.create_join_token(role)).token}

    async def _manager_answers(self) -> bool:
        key_file = self._manager.home / "admin.key"
        if not key_file.exists():
            return False
        self.context = Context(
            manager=self.plan.manager_address, api_key=key_file.read_text(encoding="ascii").strip()
        )
        async with Client.from_context(self.context, retry_s=1.0) as client:
            await client.admin.get_cluster()
        return True

    async def _until(
        self, ready: Callable[[], Coroutine[Any, Any, bool]], what: str, needed: list[Program]
    ) -> None:
        newest: DureError | None = None
        loop = asyncio.get_running_loop()
        silent_until_s: float | None = loop.time() + PATIENCE_S
        try:
            async with asyncio.timeout(START_S):
                while True:
                    try:
                        if await ready():
                            return
                    except DureError as error:  # not up yet; at the end it is told
                        newest = error
                    for program in needed:
                        process = self._running[program.name]
                        if not process.alive:
                            raise StartFailed(f"{program.name} {process.how}{self._log_tail(program)}")
                    if silent_until_s is not None and loop.time() >= silent_until_s:
                        silent_until_s = None
                        self._say(f"waiting for {what}, for {START_S:g} s at most")
                        for program in needed:
                            if program.kind == "agent" and (lines := self._last_lines(program)):
                                self._say(f"  {program.name}: {lines[-1]}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            tails = "".join(f"\n{program.name}:{self._log_tail(program)}" for program in needed)
            because = f" ({newest})" if newest else ""
            raise StartFailed(f"waited {START_S:g} s for {what}{because}{tails}") from None

    def _log_tail(self, program: Program) -> str:
        return "".join(f"\n  {line}" for line in self._last_lines(program)) or "; it left no log"

    def _last_lines(self, program: Program) -> list[str]:
        data_dir = self.plan.data_dir
        return last_lines(programs_log(data_dir, program.name), _output(data_dir, program.name))

    async def _attend(self, program: Program) -> None:
        while True:
            process = self._running[program.name]
            await process.ended()
            self._say(
                f"{program.name} {process.how}; start it again with: {program.again(self.plan.data_dir)}"
            )
            found = await self._come_back(program)
            self._running[program.name] = found
            self._say(f"{program.name} is back (pid {found.pid})")

    async def _come_back(self, program: Program) -> Process:
        # Nothing tells when somebody starts it by hand: it has to be looked for.
        while True:
            await asyncio.sleep(COME_BACK_POLL_S)
            found = self._find(program)
            if found is not None:
                return found

    async def _end(
        self, members: list[Program], number: signal.Signals | None, within_s: float, hurry: asyncio.Event
    ) -> None:
        processes = {m.name: self._running[m.name] for m in members if m.name in self._running}
        for process in processes.values():
            if number is not None:
                process.send(number)
        all_ended = asyncio.gather(*(process.ended() for process in processes.values()))
        hurried = asyncio.ensure_future(hurry.wait())
        either: set[asyncio.Future[Any]] = {all_ended, hurried}
        try:
            await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            if not all_ended.done() and hurry.is_set() and number is not None:
                for process in processes.values():
                    process.send(number)
                await asyncio.wait({all_ended}, timeout=HURRY_S)
            for name, process in processes.items():
                if process.alive:
                    self._say(f"{name} did not stop in time: killed")
                    process.send(signal.SIGKILL)
            await asyncio.wait_for(all_ended, HURRY_S)
        finally:
            hurried.cancel()
            all_ended.cancel()

    def _ended_well(self, program: Program) -> bool:
        process = self._running.get(program.name)
        return process is not None and not process.alive and process.succeeded


def programs_log(data_dir: Path, name: str) -> Path:
    return data_dir / "logs" / f"{name}.log"


def _output(data_dir: Path, name: str) -> Path:
    return data_dir / "logs" / f"{name}.stderr"


def _has_sessions(agent: Program) -> bool:
    kernels = agent.home / "kernels"
    return kernels.is_dir() and any(os.scandir(kernels))
