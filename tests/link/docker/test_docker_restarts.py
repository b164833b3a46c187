"""The engine itself is started anew under kernels that run."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from agent_fakes import alive
from containers import engines
from containers.nodes import kernel, node
from own_ports import free_port
from test_agent_clusters import session

from dure.fleet.v1 import fleet_pb2

RUNNING = fleet_pb2.KERNEL_PHASE_RUNNING
SERVE = ["/busybox", "httpd", "-f", "-p", "{port}"]


@pytest.mark.skipif(
    shutil.which("dockerd") is None, reason="needs a program `dockerd` to start another engine"
)
@pytest.mark.parametrize("live_restore", [True, False])
def test_an_engine_that_is_started_anew(tmp_path: Path, live_restore: bool) -> None:
    """With `live-restore` kernels run on; without, the engine ends them, which is seen when it is back."""

    async def run(engine: engines.OwnEngine) -> None:
        async with node(tmp_path, engine=engine.url) as (manager, _):
            # On the network of the node: that is all that this engine has. It cannot be reached from here.
            spec = session("s", 2, free_port(), SERVE, image="dure-test-small:1")[0]
            manager.want(spec)
            before = await manager.status(spec.uid, lambda s: s.phase == RUNNING and s.pid > 0)
            heartbeats = manager.heartbeats
            await asyncio.to_thread(engine.stop)
            assert alive(before.pid) is live_restore
            await manager.until(lambda: manager.heartbeats >= heartbeats + 3)
            assert not manager.statuses[spec.uid].HasField("exit"), "nobody can know yet"
            await asyncio.to_thread(engine.start)
            if live_restore:
                await asyncio.sleep(1)
                status = manager.statuses[spec.uid]
                assert (status.phase, status.pid) == (RUNNING, before.pid)
            else:
                ended = (await manager.exited(spec.uid)).exit
                assert ended.reason in ("SIGNALED", "EXITED"), ended
            manager.unwant(spec.uid)
            await manager.gone(spec.uid)
            manager.want(
                kernel("k2", ["/busybox", "no-such-applet"], image="dure-test-small:1", health_check=None)
            )
            await manager.exited("k2")
            assert not alive(before.pid)

    # Sockets have short names, and what an engine keeps must not lie in a folder that tests keep.
    folder = Path(tempfile.mkdtemp(prefix="dure-engine-"))
    with engines.own(folder, live_restore=live_restore) as engine:
        asyncio.run(run(engine))
