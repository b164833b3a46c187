"""Looks at the metrics pages of replicas, those that this proxy is the scraper of.

It never stands in traffic's way: its connections are its own, one per look and closed after it; few looks are
under way at once, each with a time limit; pages are read in small pieces, with the event loop in between.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dure.appproxy.exposition import PAGE_BYTES_MAX, Metrics, PageRefused, Reader
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
_JITTER_SHARE = 0.05
# About half a millisecond of reading.
_PIECE_BYTES = 8 * 1024
# How often the table is looked at for targets when nothing else is due.
_LOOK_S = 1.0
_PATH = re.compile(r"/[!-~]{0,2000}")
_ERROR_LENGTH_MAX = 300


class ScrapeFailed(Exception):
    """No metrics. The message says why, for people."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A target to be scraped."""

    target: Target
    scraping: Scraping


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
        self._due_s: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._targets: dict[str, _Wanted] = {}
        self._changed = asyncio.Event()
        live.on_table.append(self._changed.set)

    @property
    def wanted(self) -> bool:
        return self._wanted

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        if wanted != self._wanted:
            self._wanted = wanted
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                if self._changed.is_set():
                    self._changed.clear()
                    self._take_up_table()
                pause_s = self._start_due()
                try:
                    async with asyncio.timeout(pause_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take_up_table(self) -> None:
        self._targets = {wanted.target.replica_uid: wanted for wanted in self._mine()}
        now_s = self._clock()
        self._due_s = {
            # A first look at any time within the interval: replicas of one table are not all due at once.
            uid: self._due_s.get(uid, now_s + random.random() * _interval_s(wanted.scraping))
            for uid, wanted in self._targets.items()
        }
        for uid in self.found.keys() - self._targets.keys():
            del self.found[uid]

    def _mine(self) -> Iterator[_Wanted]:
        members = self._live.table.members
        for route in self._live.table.routes.values() if self._wanted else ():
            if route.scraping is None:
                continue
            for target in route.targets:
                if not target.draining and (
                    not members or scraper_of(members, target.replica_uid) == self._name
                ):
                    yield _Wanted(target, route.scraping)

    def _start_due(self) -> float:
        """Starts what is due and has room; returns the seconds until there is something to do again."""
        now_s, next_s = self._clock(), _LOOK_S
        for uid, due_s in self._due_s.items():
            if due_s > now_s or uid in self._running:
                next_s = min(next_s, due_s - now_s if due_s > now_s else next_s)
                continue
            if len(self._running) >= SCRAPES_AT_ONCE_MAX:
                break
            interval_s = _interval_s(self._targets[uid].scraping)
            # A look that comes late does not make the next one early.
            self._due_s[uid] = now_s + interval_s * (1 + random.uniform(-_JITTER_SHARE, _JITTER_SHARE))
            next_s = min(next_s, interval_s)
            task = asyncio.create_task(self._scrape(self._targets[uid]))
            self._running[uid] = task
            task.add_done_callback(lambda _, uid=uid: self._ended(uid))
        return next_s

    def _ended(self, uid: str) -> None:
        full = len(self._running) >= SCRAPES_AT_ONCE_MAX
        del self._running[uid]
        if full:
            self._changed.set()

    async def _scrape(self, wanted: _Wanted) -> None:
        uid, began_s = wanted.target.replica_uid, self._clock()
        limit_s = min(SCRAPE_MAX_S, _interval_s(wanted.scraping) * _SCRAPE_SHARE)
        try:
            async with asyncio.timeout(limit_s):
                metrics = await fetch(wanted.target.host, wanted.target.port, wanted.scraping.path)
            message = _message_of(metrics)
            self.succeeded += 1
            self.broken_lines += metrics.broken
        except TimeoutError:
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
        if uid in self._targets:
            self.found[uid] = Scraped(ended_s, message)


async def fetch(host: str, port: int, path: str) -> Metrics:
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
        reader, inflate = Reader(), None
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
    while data and not inflate.eof:
        try:
            reader.feed(inflate.decompress(data, _PIECE_BYTES))
        except zlib.error as error:
            raise ScrapeFailed("its gzip data is damaged") from error
        data = inflate.unconsumed_tail
        await asyncio.sleep(0)


def _interval_s(scraping: Scraping) -> float:
    return max(INTERVAL_MIN_S, scraping.interval_ms / 1000)


def _message_of(metrics: Metrics) -> pb.Scrape:
    message = pb.Scrape(gauges=metrics.gauges, counters=metrics.counters)
    for name, histogram in metrics.histograms.items():
        message.histograms[name].CopyFrom(pb.Histogram(bounds=histogram.bounds, counts=histogram.counts))
    return message
