"""Is the cluster of a context in order? Each check says what it saw, and what to do."""

from __future__ import annotations

import asyncio
import importlib.metadata
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from dure.client.client import Client
from dure.client.context import context_path, load_context
from dure.v1 import agent_pb2
from dure.v1.admin_pb2 import GetClusterResponse, Proxy
from dure.v1.agent_pb2 import Agent
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut

# A proxy applies a new route table within this; only one that stays behind is in trouble.
ROUTES_SETTLE_S = 2.0
_HTTP_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `remedy` is empty when `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass
class CheckUp:
    """All checks, in the order they were made; those that rest on a failed one are missing."""

    checks: list[Check] = field(default_factory=list)
    exit_code: int = 0

    def add(self, name: str, ok: bool, detail: str, remedy: str = "", exit_code: int = 1) -> bool:
        self.checks.append(Check(name, ok, detail, "" if ok else remedy))
        if not ok and not self.exit_code:
            self.exit_code = exit_code
        return ok

    @property
    def ok(self) -> bool:
        return not self.exit_code


async def check_up(path: Path | None, retry_s: float = 1.0) -> CheckUp:
    """Never raises what the cluster can cause: it is what the check-up tells."""
    result = CheckUp()
    path = path or context_path()
    try:
        context = load_context(path)
        client = Client.from_context(context, retry_s=retry_s, timeout_s=5.0)
    except DureError as error:
        result.add(
            "context",
            False,
            error.message,
            "run `dure dev`, or `dure context set --manager HOST:PORT --api-key KEY`",
            error.exit_code,
        )
        return result
    result.add("context", True, f"{path}: manager {context.manager}, project {context.project}")
    async with client:
        try:
            cluster = await client.admin.get_cluster()
            agents = [agent async for agent in client.agents.list()]
            if _behind(cluster):
                await asyncio.sleep(ROUTES_SETTLE_S)
                target = cluster.route_revision_number
                cluster = await client.admin.get_cluster()
                # Judged by what was newest then: on a busy cluster there is always something newer.
                cluster.route_revision_number = target
        except (ManagerUnreachable, TimedOut) as error:
            remedy = "start it (`dure manager`, or `dure dev`), or name another with `dure context set`"
            result.add("manager", False, error.message, remedy, error.exit_code)
            return result
        except DureError as error:
            result.add("manager", True, f"answers at {context.manager}")
            remedy = "give a key that it knows: `dure context set --api-key KEY`"
            result.add("API key", False, error.message, remedy, error.exit_code)
            return result
    ours = importlib.metadata.version("dure")
    result.add(
        "manager",
        cluster.version == ours,
        f"answers at {context.manager}, version {cluster.version}"
        + ("" if cluster.version == ours else f", but this is version {ours}"),
        "install the same version here and there",
    )
    result.add("API key", True, "accepted")
    _check_agents(result, agents)
    await _check_proxies(result, cluster)
    return result


def _behind(cluster: GetClusterResponse) -> bool:
    newest = cluster.route_revision_number
    return any(proxy.connected and proxy.applied_revision_number < newest for proxy in cluster.proxies)


def _check_agents(result: CheckUp, agents: list[Agent]) -> None:
    alive = [agent for agent in agents if agent.status == agent_pb2.AGENT_STATUS_ALIVE]
    result.add(
        "agents",
        bool(alive),
        f"{len(alive)} of {len(agents)} alive",
        "start one: `dure join-token create agent`, then `dure agent` on the node",
    )
    for agent in agents:
        name = agent.name.rsplit("/", 1)[-1]
        if agent not in alive:
            why = agent.status_reason or "not heard of"
            result.add(f"agent {name}", False, why, f"start it again: `dure agent --name {name}` on its node")
        for device in agent.devices:
            if not device.healthy:
                result.add(f"agent {name}", False, f"device {device.id}: {device.detail}", "mend the device")


async def _check_proxies(result: CheckUp, cluster: GetClusterResponse) -> None:
    connected = [proxy for proxy in cluster.proxies if proxy.connected]
    result.add(
        "proxies",
        bool(connected),
        f"{len(connected)} of {len(cluster.proxies)} connected",
        "start one: `dure join-token create proxy`, then `dure proxy`",
    )
    answers = await asyncio.gather(*(asyncio.to_thread(_readyz, proxy.admin_url) for proxy in connected))
    reached = dict(zip((proxy.name for proxy in connected), answers, strict=True))
    for proxy in cluster.proxies:
        _check_proxy(result, proxy, cluster.route_revision_number, reached.get(proxy.name, ""))


def _check_proxy(result: CheckUp, proxy: Proxy, newest: int, trouble: str) -> None:
    name = f"proxy {proxy.name.rsplit('/', 1)[-1]}"
    if not proxy.connected:
        result.add(name, False, "not connected", "start it again with `dure proxy`; its log says more")
        return
    applied = proxy.applied_revision_number
    current = applied >= newest
    result.add(
        name,
        current,
        f"routes at revision {applied}" + ("" if current else f", the newest is {newest}"),
        "its log says why it is behind",
    )
    result.add(
        f"{name} admin port",
        not trouble,
        trouble or f"ready at {proxy.admin_url}",
        "look at its log; from another machine the admin port may be out of reach",
    )
    targets = ", ".join(proxy.unreachable_targets)
    result.add(
        f"{name} to replicas",
        not targets,
        f"cannot reach {targets}" if targets else "all reachable",
        "let the proxy reach the agents' session ports, or set `--advertise-address` of the agents",
    )


def _readyz(admin_url: str) -> str:
    """What is wrong with a proxy's admin port; empty if it is ready."""
    if not admin_url:
        return "it has not told where its admin port is"
    url = f"{admin_url.rstrip('/')}/readyz"
    try:
        # An HTTP proxy of the environment has no part in this.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_HTTP_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"{url} answers {error.code}: not ready"
    except (OSError, ValueError) as error:
        return f"{url}: {getattr(error, 'reason', None) or error}"
