"""Looks at the metrics pages of replicas, those that this proxy is the scraper of.

It never stands in traffic's way: its connections are its own, one per look and closed after it; few looks are
under way at once, each with a time limit; pages are read in small pieces, with the event loop in between.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dure.appproxy.exposition import PAGE_BYTES_MAX, Memory, Metrics, PageRefused, Reader
from dure.appproxy.live import Live
from dure.appproxy.measuring import Scraped
from dure.appproxy.response import Cut, End, Head, Malformed
from dure.appproxy.table import Scraping, Target, scraper_of
from dure.appproxy.upstream import ConnectFailed, connect
from dure.routing.v1 import routing_pb2 as pb

log = logging.getLogger(__name__)

SCRAPES_AT_ONCE_MAX = 16
SCRAPE_MAX_S = 1.0
# A part of the interval, so that a look has ended when the next is due.
_SCRAPE_SHARE = 0.9
INTERVAL_MIN_S = 0.1
_JITTER = 0.05
_PAUSE_MAX_S = 10.0
# About half a millisecond of reading.
_PIECE_BYTES = 8 * 1024
_PATH = re.compile(r"/[!-~]{0,2000}")
_ERROR_LENGTH_MAX = 300


class ScrapeFailed(Exception):
    """No metrics. The message says why, for people."""


@dataclass(eq=False, slots=True)
class _Target:
    """A target to be scraped; infinitely far off while it is. `timeouts` are those in a row."""

    target: Target
    scraping: Scraping
    due_s: float
    timeouts: int = 0


class Scraper:
    """`run` it. `found` has the newest look at each replica; `wanted` whether anybody wants to know."""

    def __init__(self, live: Live, name: str, clock: Callable[[], float]) -> None:
        self.found: dict[str, Scraped] = {}
        self.succeeded = 0
        self.failed = 0
        self.broken_lines = 0
        self.duration_sum_s = 0.0
        self._live = live
        self._name = name
        self._clock = clock
        self._wanted = False
        self._targets: dict[str, _Target] = {}
        # When each is due; what its target no longer says is out of date.
        self._queue: list[tuple[float, str]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._scrapers: dict[str, str] = {}
        self._members: tuple[str, ...] = ()
        self._memory = Memory()
        self._stale = False
        self._wake = asyncio.Event()
        live.on_table.append(self._look_again)

    @property
    def wanted(self) -> bool:
        return self._wanted

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._look_again()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._wake.clear()
                if self._stale:
                    self._stale = False
                    self._take_up_table()
                try:
                    async with asyncio.timeout(self._start_due()):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            tasks = list(self._running)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _look_again(self) -> None:
        self._stale = True
        self._wake.set()

    def _take_up_table(self) -> None:
        before, self._targets, now_s = self._targets, {}, self._clock()
        for target, scraping in self._mine():
            known = before.get(target.replica_uid)
            if known is None or (known.target.host, known.target.port) != (target.host, target.port):
                # A first look at any time within the interval: replicas of one table are not all due at once.
                known = _Target(target, scraping, now_s + random.random() * _interval_s(scraping))
                heapq.heappush(self._queue, (known.due_s, target.replica_uid))
            known.target, known.scraping = target, scraping
            self._targets[target.replica_uid] = known
        for uid in self.found.keys() - self._targets.keys():
            del self.found[uid]

    def _mine(self) -> Iterator[tuple[Target, Scraping]]:
        members = self._live.table.members
        if members != self._members:
            self._members, self._scrapers = members, {}
        before, self._scrapers = self._scrapers, {}
        for route in self._live.table.routes.values() if self._wanted else ():
            if route.scraping is None:
                continue
            for target in route.targets:
                uid = target.replica_uid
                scraper = self._scrapers[uid] = before.get(uid) or scraper_of(members, uid)
                if not target.draining and scraper in ("", self._name):
                    yield target, route.scraping

    def _start_due(self) -> float | None:
        """Starts what is due, while there is room; returns the seconds until the next is due."""
        now_s = self._clock()
        while self._queue:
            due_s, uid = self._queue[0]
            target = self._targets.get(uid)
            if target is None or target.due_s != due_s:
                heapq.heappop(self._queue)
            elif due_s > now_s:
                return due_s - now_s
            elif len(self._running) >= SCRAPES_AT_ONCE_MAX:
                return None
            else:
                heapq.heappop(self._queue)
                # Nothing is due of it until this look has ended.
                target.due_s = math.inf
                task = asyncio.create_task(self._scrape(target))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        return None

    async def _scrape(self, target: _Target) -> None:
        uid, began_s = target.target.replica_uid, self._clock()
        interval_s = _interval_s(target.scraping)
        limit_s = min(SCRAPE_MAX_S, interval_s * _SCRAPE_SHARE)
        timeouts, target.timeouts = target.timeouts, 0
        try:
            async with asyncio.timeout(limit_s):
                metrics = await fetch(
                    target.target.host, target.target.port, target.scraping.path, self._memory
                )
            message = _message_of(metrics)
            self.succeeded += 1
            self.broken_lines += metrics.broken
        except TimeoutError:
            target.timeouts = timeouts + 1
            message = pb.Scrape(error=f"no whole page within {limit_s:g} s")
        except (ScrapeFailed, PageRefused, ConnectFailed, Cut, Malformed) as error:
            message = pb.Scrape(error=str(error)[:_ERROR_LENGTH_MAX])
        except Exception:
            # A bug must cost a look at metrics, never the proxy.
            log.exception("scraping replica %s failed", uid)
            message = pb.Scrape(error="internal error of the proxy")
        self.failed += bool(message.error)
        ended_s = self._clock()
        self.duration_sum_s += ended_s - began_s
        if self._targets.get(uid) is target:
            self.found[uid] = Scraped(ended_s, message)
            # Pages that do not come hold a place each: they are asked for less and less often.
            pause_s = max(interval_s, min(_PAUSE_MAX_S, interval_s * 2.0 ** min(target.timeouts - 1, 10)))
            target.due_s = max(ended_s, began_s + pause_s * (1 + random.uniform(-_JITTER, _JITTER)))
            heapq.heappush(self._queue, (target.due_s, uid))
        self._wake.set()


async def fetch(host: str, port: int, path: str, memory: Memory) -> Metrics:
    """What a metrics page shows; set a time limit.

    Raises ScrapeFailed, PageRefused, ConnectFailed, Cut or Malformed.
    """
    if not _PATH.fullmatch(path):
        raise ScrapeFailed("metrics_path is not a path: it begins with / and has no spaces")
    connection = await connect((host, port))
    try:
        connection.begin("GET")
        connection.write(
            f"GET {path} HTTP/1.1\r\nHost: {f'[{host}]' if ':' in host else host}:{port}\r\n"
            "User-Agent: dure-proxy\r\nAccept: text/plain;version=0.0.4, */*;q=0.5\r\n"
            "Accept-Encoding: gzip\r\nConnection: close\r\n\r\n".encode("latin-1")
        )
        reader, inflate = Reader(memory), None
        received_bytes = 0
        while True:
            for event in await connection.take():
                if isinstance(event, bytes):
                    received_bytes += len(event)
                    if received_bytes > PAGE_BYTES_MAX:
                        raise ScrapeFailed(f"the page is larger than {PAGE_BYTES_MAX} bytes")
                    if inflate is None:
                        await _read(reader, event)
                    else:
                        await _inflate(reader, inflate, event)
                elif isinstance(event, Head):
                    inflate = _check(event) or inflate
                elif isinstance(event, End):
                    if inflate is not None and not inflate.eof:
                        raise ScrapeFailed("its gzip data breaks off")
                    return reader.end()
    finally:
        connection.abort()


def _check(head: Head) -> zlib._Decompress | None:
    """What inflates the body, if it has to be. Raises ScrapeFailed for what is no metrics page."""
    if head.status < 200:
        if head.status == 101:
            raise ScrapeFailed("it switched protocols")
        return None
    if 300 <= head.status < 400:
        raise ScrapeFailed(f"it redirects (status {head.status}), which is not followed")
    if head.status != 200:
        raise ScrapeFailed(f"it answered with status {head.status}")
    encodings = [value.strip().lower() for name, value in head.headers if name.lower() == b"content-encoding"]
    if encodings in ([], [b"identity"], [b""]):
        return None
    if encodings in ([b"gzip"], [b"x-gzip"]):
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    raise ScrapeFailed("its content encoding is not gzip")


async def _read(reader: Reader, data: bytes) -> None:
    for start in range(0, len(data), _PIECE_BYTES):
        reader.feed(data[start : start + _PIECE_BYTES])
        await asyncio.sleep(0)


async def _inflate(reader: Reader, inflate: zlib._Decompress, data: bytes) -> None:
    """Bounded by the reader: a small body that inflates to gigabytes ends at the page's limit."""
    while not inflate.eof:
        try:
            piece = inflate.decompress(data, _PIECE_BYTES)
        except zlib.error as error:
            raise ScrapeFailed("its gzip data is damaged") from error
        reader.feed(piece)
        data = inflate.unconsumed_tail
        if not data and len(piece) < _PIECE_BYTES:
            return
        await asyncio.sleep(0)


def _interval_s(scraping: Scraping) -> float:
    return max(INTERVAL_MIN_S, scraping.interval_ms / 1000)


def _message_of(metrics: Metrics) -> pb.Scrape:
    message = pb.Scrape(gauges=metrics.gauges, counters=metrics.counters)
    for name, histogram in metrics.histograms.items():
        message.histograms[name].CopyFrom(pb.Histogram(bounds=histogram.bounds, counts=histogram.counts))
    return message
