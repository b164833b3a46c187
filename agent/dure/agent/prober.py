"""Probes a kernel as its health check says; `health` decides what they mean."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from yarl import URL

from dure.agent import health
from dure.agent.health import Health, Policy

DETAIL_CHARACTERS_MAX = 300
_HEADERS = {"User-Agent": "dure-agent"}


@dataclass(frozen=True)
class Answer:
    """What a probe found; `status_code` 0 if there was no HTTP answer."""

    success: bool
    status_code: int = 0
    detail: str = ""


@dataclass(frozen=True)
class Target:
    """Where to probe. `complaint` tells, in a sentence, if a stranger listens there."""

    host: str
    port: int
    path: str
    expected_status_code: int
    complaint: Callable[[], Awaitable[str]]


def now_s() -> float:
    """The clock that a command's start is recorded by; it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def open_session() -> aiohttp.ClientSession:
    """For all probes of an agent. Connections are closed after each: idle ones starve small model servers."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    return aiohttp.ClientSession(
        connector=connector,
        headers=_HEADERS,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )


async def probe_on(
    session: aiohttp.ClientSession,
    target: Target,
    policy: Policy | None,
    current: Health,
    started_at_s: float,
    record: Callable[[Health, Answer], None],
) -> None:
    """Probes until it is cancelled."""
    ended_s = 0.0 if current.index == 1 else now_s() - started_at_s
    while True:
        due_s = health.due_s(policy, current, ended_s)
        await asyncio.sleep(max(0.0, started_at_s + due_s - now_s()))
        answer = await _probe(session, target, policy)
        ended_s = now_s() - started_at_s
        current = health.record(policy, current, answer.success)
        record(current, answer)


async def _probe(session: aiohttp.ClientSession, target: Target, policy: Policy | None) -> Answer:
    limit_s = policy.max_wait_s if policy is not None else health.ACCEPT_MAX_WAIT_S
    try:
        async with asyncio.timeout(limit_s):
            answer = await (_get(session, target) if policy is not None else _accept(target))
            if answer.success:
                complaint = await target.complaint()
                if complaint:
                    return Answer(False, answer.status_code, complaint)
            return answer
    except TimeoutError:
        detail = f"no answer within {limit_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        detail = await target.complaint() or str(error) or type(error).__name__
    return Answer(False, 0, detail[:DETAIL_CHARACTERS_MAX])


async def _get(session: aiohttp.ClientSession, target: Target) -> Answer:
    host = f"[{target.host}]" if ":" in target.host else target.host
    url = URL(f"http://{host}:{target.port}{target.path}", encoded=True)
    async with session.get(url, allow_redirects=False) as response:
        status = response.status
    if status == target.expected_status_code:
        return Answer(True, status)
    return Answer(False, status, f"{target.path} answered {status}, not {target.expected_status_code}")


async def _accept(target: Target) -> Answer:
    _, writer = await asyncio.open_connection(target.host, target.port)
    # Closed without ceremony: the connection has told all that it can.
    writer.transport.abort()
    return Answer(True)
