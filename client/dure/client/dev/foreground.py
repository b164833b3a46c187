"""Running a development cluster in the foreground until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from dure.client.dev.cluster import PROXY, DevCluster, Plan, Say
from dure.client.dev.ports import LoopbackProbe, WantedPorts, choose, choose_metrics
from dure.client.dev.processes import find
from dure.wire import programs
from dure.wire.settings import read_toml, write_toml

Body = Callable[[DevCluster], Awaitable[None]]


def make_plan(
    data_dir: Path,
    wanted: WantedPorts,
    agents: int,
    simulated_gpus: int,
    cpus: int | None,
    say: Say,
    backend: str = "process",
) -> Plan:
    """Chooses the ports and records them in the data folder; needs a running event loop."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    recorded = read_toml(data_dir / "dev.toml")
    running = set()
    homes = {
        "manager": ("manager", programs.manager_dir(data_dir)),
        "proxy": (PROXY, programs.proxy_dir(data_dir, PROXY)),
    }
    names = [f"agent-{number}" for number in range(1, agents + 1)]
    homes |= {name: (name, programs.agent_dir(data_dir, name)) for name in names}
    for kind, (name, home) in homes.items():
        process = find(data_dir / "run" / f"{name}.pid", home / "lock")
        if process is not None:
            process.let_go()
            running.add(kind)
    ports, notes = choose(wanted, recorded, LoopbackProbe(), frozenset(running))
    for note in notes:
        say(note)
    metrics = choose_metrics(["manager", *names], recorded, LoopbackProbe(), ports, frozenset(running))
    write_toml(
        data_dir / "dev.toml",
        {
            "manager_port": ports.manager,
            "proxy_admin_port": ports.admin,
            "proxy_ports": f"{ports.pool[0]}-{ports.pool[1]}",
            "metrics_ports": list(metrics),
        },
        mode=0o644,
    )
    return Plan(data_dir, ports, agents, simulated_gpus, cpus, metrics, backend)


async def in_foreground(
    cluster: DevCluster, context_files: Iterable[Path], started: Body, body: Body | None
) -> bool:
    """Starts the cluster, runs `started`, then `body` (None: for ever), until that ends or a signal comes.

    SIGINT, SIGTERM and SIGHUP end it early; a second one hurries. Whatever happens the cluster is stopped.
    Returns whether `body` came to its end.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    async def work() -> None:
        await cluster.start(context_files)
        watcher = asyncio.create_task(cluster.watch())
        try:
            await started(cluster)
            await (body(cluster) if body else asyncio.Event().wait())
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    with _signals(on_signal):
        worker, stopped = asyncio.create_task(work()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({worker, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            # From here on any further signal hurries.
            stop.set()
            if not worker.done():
                worker.cancel()
            await asyncio.wait({worker})
            await cluster.stop(hurry)
        if worker.cancelled():
            return False
        worker.result()
        return True


@contextlib.contextmanager
def _signals(callback: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in caught:
        loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
