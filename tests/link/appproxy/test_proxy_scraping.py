"""Metrics pages of replicas: who is asked, what of it is reported, and that traffic never notices."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import time
from pathlib import Path

from aiohttp import web
from proxy_fakes import Bench, RawHandler, bench, raw_replica, read_head, replica, route, run, target, until

from dure.appproxy.exposition import PAGE_BYTES_MAX
from dure.appproxy.scraper import SCRAPES_AT_ONCE_MAX
from dure.appproxy.table import scraper_of
from dure.routing.v1 import routing_pb2 as pb

FAST = pb.ScrapeSettings(path="/metrics", interval_ms=1000)
GZIP = b"Content-Encoding: gzip\r\n"
PAGE = b"""# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 40
# TYPE h histogram
h_bucket{le="1"} 3
h_bucket{le="+Inf"} 4
"""


def _scrapes(b: Bench, uid: str) -> list[pb.Scrape]:
    return [
        seen.scrape
        for report in b.manager.reports
        for measurement in report.measurements
        for seen in measurement.replicas
        if seen.replica_uid == uid and seen.HasField("scrape")
    ]


async def _first(b: Bench, port: int) -> pb.Scrape:
    found = await until(lambda: _scrapes(b, f"replica-{port}"), timeout_s=8)
    return found[0]


def _answering(answer: bytes) -> RawHandler:
    """Answers /metrics with given bytes and closes, everything else with 200."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        writer.write(
            answer
            if head.startswith(b"GET /metrics")
            else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
        )
        await writer.drain()

    return handler


def _page(body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_page_is_reported_as_it_stands_again_and_again(tmp_path: Path) -> None:
    async def test() -> None:
        heads: list[str] = []
        shown = 0

        async def handler(request: web.Request) -> web.Response:
            nonlocal shown
            heads.append(f"{request.method} {request.raw_path} {request.headers.get('Authorization')}")
            shown += 1
            return web.Response(body=PAGE + b"# TYPE n counter\nn_total %d\n" % shown)

        async with bench(tmp_path) as b, replica(handler) as port:
            scrape = pb.ScrapeSettings(path="/deep/metrics?x=1", interval_ms=200)
            await b.serves(route("e", b.port, port, scrape=scrape))
            await until(lambda: len(_scrapes(b, f"replica-{port}")) >= 2, timeout_s=8)
            first, second = _scrapes(b, f"replica-{port}")[:2]
            assert first.gauges == {"llamacpp:requests_processing": 2.0}
            assert first.counters["llamacpp:tokens_predicted_total"] == 40.0
            assert list(first.histograms["h"].bounds) == [1.0, float("inf")]
            assert list(first.histograms["h"].counts) == [3.0, 4.0]
            assert first.age_ms < 1000
            assert second.counters["n_total"] > first.counters["n_total"]
            assert set(heads) == {"GET /deep/metrics?x=1 None"}
            # Five a second, give or take the jitter, the machine and the first report's lateness.
            assert len(heads) <= 16
            text = await b.proxy.metrics()
            assert "dure_proxy_scraped_replicas 1\n" in text
            assert "dure_proxy_scrapes_failed_total 0\n" in text

    run(test)


# What a replica answers at /metrics, and what the report says then.
NO_PAGES = {
    "status": (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "status 500"),
    "missing": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
    "redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        "redirects",
    ),
    "upgrade": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "switched"),
    "ssh": (b"SSH-2.0-OpenSSH\r\n\r\n", ""),
    "nothing": (b"", ""),
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\na 1\n", ""),
    "html": (_page(b"<html>hello</html>"), "no line"),
    "samples": (_page(b"a 1\n" * 30_000), "samples"),
    "huge": (_page(b"# " + b"x" * PAGE_BYTES_MAX), "larger"),
    "bomb": (_page(gzip.compress(b"# " + b"x" * 50_000_000), GZIP), "larger"),
    "half a gzip": (_page(gzip.compress(PAGE)[:-20], GZIP), "breaks off"),
    "no gzip": (_page(b"no gzip at all", GZIP), "damaged"),
    "brotli": (_page(PAGE, b"Content-Encoding: br\r\n"), "encoding"),
}
PAGES = {
    "gzip": _page(gzip.compress(PAGE), GZIP),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (len(PAGE), PAGE),
    "until the end": b"HTTP/1.0 200 OK\r\n\r\n" + PAGE,
    "broken lines": _page(PAGE + b"broken line here\n\xff\xfe\nalso{broken 1\nx NaN\n"),
}


def test_pages_as_servers_send_them_and_pages_that_are_none(tmp_path: Path) -> None:
    async def test() -> None:
        async with bench(tmp_path) as b, contextlib.AsyncExitStack() as stack:
            answers = {**PAGES, **{name: answer for name, (answer, _) in NO_PAGES.items()}}
            ports = {
                name: await stack.enter_async_context(raw_replica(_answering(answer)))
                for name, answer in answers.items()
            }
            await b.serves(route("e", b.port, *ports.values(), scrape=FAST))
            for name in PAGES:
                scrape = await _first(b, ports[name])
                assert not scrape.error, (name, scrape.error)
                assert scrape.gauges == {"llamacpp:requests_processing": 2.0}, name
            for name, (_, said) in NO_PAGES.items():
                scrape = await _first(b, ports[name])
                assert scrape.error and said in scrape.error, (name, scrape.error)
                assert not (scrape.gauges or scrape.counters or scrape.histograms), name
            # All of them take traffic as before.
            for _ in range(2 * len(ports)):
                async with b.http.get(b.url) as response:
                    assert (response.status, await response.read()) == (200, b"ok")
            assert not any(report.unreachable_targets for report in b.manager.reports)

    run(test)


async def _hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if (await read_head(reader)).startswith(b"GET /metrics"):
        await asyncio.sleep(3600)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await writer.drain()


async def _never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if (await read_head(reader)).startswith(b"GET /metrics"):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"# and so on\n")
            await writer.drain()
            await asyncio.sleep(0.01)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await writer.drain()


async def _pours(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if (await read_head(reader)).startswith(b"GET /metrics"):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    await writer.drain()


def test_pages_without_an_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            bench(tmp_path) as b,
            raw_replica(_hangs) as hangs,
            raw_replica(_never_ends) as never_ends,
            raw_replica(_pours) as pours,
        ):
            await b.serves(route("e", b.port, hangs, never_ends, pours, scrape=FAST))
            assert "within" in (await _first(b, hangs)).error
            assert "within" in (await _first(b, never_ends)).error
            assert "larger" in (await _first(b, pours)).error
            for _ in range(6):
                async with b.http.get(b.url) as response:
                    assert response.status == 200

    run(test)


def test_many_that_hang_do_not_keep_the_others_waiting_for_long(tmp_path: Path) -> None:
    async def test() -> None:
        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=PAGE)

        async with bench(tmp_path) as b, raw_replica(_hangs) as bad, replica(handler) as good:
            hanging = [
                pb.Target(replica_uid=f"bad-{n}", host="127.0.0.1", port=bad, weight=1)
                for n in range(3 * SCRAPES_AT_ONCE_MAX)
            ]
            await b.serves(route("e", b.port, *hanging, target(good), scrape=FAST))
            await until(lambda: len(_scrapes(b, f"replica-{good}")) >= 3, timeout_s=10)
            assert not _scrapes(b, f"replica-{good}")[0].error
            await until(lambda: len({n for n in range(48) if _scrapes(b, f"bad-{n}")}) == 48, timeout_s=10)

    run(test)


def test_traffic_does_not_notice_scrapes_of_huge_pages(tmp_path: Path) -> None:
    async def test() -> None:
        huge = b"".join(b'some_metric_%d{label="value",other="value"} %d\n' % (n, n) for n in range(19_000))

        async def handler(request: web.Request) -> web.Response:
            return web.Response(body=huge if request.path == "/metrics" else b"ok")

        async with bench(tmp_path, requests_per_replica=1) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port, scrape=FAST))
            await until(lambda: _scrapes(b, f"replica-{port}"), timeout_s=8)
            worst_s = 0.0
            for _ in range(100):
                began_s = time.monotonic()
                # The one place that this replica has is never taken by a scrape.
                async with b.http.get(b.url) as response:
                    assert response.status == 200
                worst_s = max(worst_s, time.monotonic() - began_s)
            assert worst_s < 0.5

    run(test)


def test_a_path_that_is_none_is_said_and_the_route_stands(tmp_path: Path) -> None:
    async def test() -> None:
        paths = ["", "metrics", "/a b", "/a\r\nX: y", "http://127.0.0.1/"]
        async with bench(tmp_path) as b, raw_replica(_answering(_page(PAGE))) as port:
            await b.serves(
                *(
                    route(
                        f"e{number}",
                        b.port if not number else 0,
                        pb.Target(replica_uid=f"r{number}", host="127.0.0.1", port=port, weight=1),
                        label=f"l{number}",
                        scrape=pb.ScrapeSettings(path=path, interval_ms=1500),
                    )
                    for number, path in enumerate(paths)
                )
            )
            for number in range(len(paths)):
                found = await until(lambda uid=f"r{number}": _scrapes(b, uid), timeout_s=8)
                assert "path" in found[0].error
            async with b.http.get(b.url) as response:
                assert response.status == 200

    run(test)


def test_only_its_share_and_nobody_that_drains(tmp_path: Path) -> None:
    async def test() -> None:
        asked: set[str] = set()

        async def handler(request: web.Request) -> web.Response:
            asked.add(request.headers["Host"])
            return web.Response(body=PAGE)

        async with bench(tmp_path) as b, replica(handler) as one, replica(handler) as two:
            members = ["proxy-1", "proxy-2"]
            uids = [f"r{n}" for n in range(40)]
            mine = {uid for uid in uids if scraper_of(members, uid) == "proxy-1"}
            assert 5 < len(mine) < 35
            targets = [pb.Target(replica_uid=uid, host="127.0.0.1", port=one, weight=1) for uid in uids]
            b.manager.members = members
            await b.serves(
                route("e", b.port, *targets, target(two, draining=True), scrape=FAST),
            )
            await until(lambda: {uid for uid in uids if _scrapes(b, uid)} == mine, timeout_s=8)
            # The other proxy goes: now all are this one's.
            b.manager.members = ["proxy-1"]
            await b.manager.set()
            await until(lambda: {uid for uid in uids if _scrapes(b, uid)} == set(uids), timeout_s=8)
            assert asked == {f"127.0.0.1:{one}"}

    run(test)


def test_nobody_is_asked_while_nobody_wants_to_know(tmp_path: Path) -> None:
    async def test() -> None:
        asked = 0

        async def handler(request: web.Request) -> web.Response:
            nonlocal asked
            asked += 1
            return web.Response(body=PAGE)

        async with bench(tmp_path) as b, replica(handler) as port:
            await b.serves(route("e", b.port, port, scrape=FAST))
            await until(lambda: asked > 2)
            await b.manager.stop()

            async def lost() -> bool:
                return not (await b.proxy.readyz())["manager_connected"]

            while not await lost():
                await asyncio.sleep(0.01)
            before = asked
            await asyncio.sleep(1)
            assert asked <= before + 1
            count = len(b.manager.reports)
            await b.manager.start()
            await until(lambda: asked > before + 2, timeout_s=8)
            await until(lambda: len(_scrapes(b, f"replica-{port}")) > 0 and len(b.manager.reports) > count)

    run(test)
