"""The admin port: /metrics, /livez, /readyz."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from dure.appproxy.exhibit import render
from dure.appproxy.live import Live
from dure.appproxy.scraper import Scraper
from dure.appproxy.sync import Sync
from dure.appproxy.upstream import Pool

_PIECES_AT_ONCE = 50


def make_admin(
    live: Live,
    pool: Pool,
    sync: Sync,
    scraper: Scraper,
    clock: Callable[[], float],
    disk_age_s: float | None,
) -> web.Application:
    """The application. `disk_age_s` is how old the table was that was read from disk at start, if one was."""
    started_s = clock()

    def table_age_s() -> float | None:
        """Seconds since the table was last known to be the manager's."""
        if sync.heard_at_s is not None:
            return clock() - sync.heard_at_s
        return disk_age_s + clock() - started_s if disk_age_s is not None else None

    async def metrics(_: web.Request) -> web.Response:
        age_s = table_age_s()
        counters = {
            "dure_proxy_unmatched_requests_total": live.unmatched,
            "dure_proxy_upstream_connections_opened_total": pool.opened,
            "dure_proxy_upstream_connections_reused_total": pool.reused,
            "dure_proxy_reports_total": sync.reports,
            "dure_proxy_scrapes_total": scraper.succeeded + scraper.failed,
            "dure_proxy_scrapes_failed_total": scraper.failed,
            "dure_proxy_scrape_broken_lines_total": scraper.broken_lines,
            "dure_proxy_scrape_duration_seconds_total": scraper.duration_sum_s,
        }
        gauges: dict[str, float] = {
            "dure_proxy_manager_connected": sync.connected,
            "dure_proxy_table_revision_number": live.table.revision_number,
            "dure_proxy_endpoints": len(live.endpoints),
            "dure_proxy_active_requests": live.active,
            "dure_proxy_idle_upstream_connections": pool.idle_count(),
            "dure_proxy_scraped_replicas": len(scraper.found),
            "dure_proxy_failing_scrapes": sum(bool(s.message.error) for s in scraper.found.values()),
        }
        if age_s is not None:
            gauges["dure_proxy_table_age_seconds"] = age_s
        meters = {uid: endpoint.meter for uid, endpoint in live.endpoints.items()}
        pieces: list[str] = []
        for piece in render(meters, counters, gauges):
            pieces.append(piece)
            if len(pieces) % _PIECES_AT_ONCE == 0:
                # A page of a thousand endpoints takes a tenth of a second: requests go on meanwhile.
                await asyncio.sleep(0)
        return web.Response(
            text="".join(pieces), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def livez(_: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def readyz(_: web.Request) -> web.Response:
        ready = bool(live.table.id)
        age_s = table_age_s()
        body = {
            "status": "ready" if ready else "no route table yet, neither on disk nor from the manager",
            "table_revision_number": live.table.revision_number,
            "table_age_s": round(age_s, 3) if age_s is not None else None,
            "manager_connected": sync.connected,
            "endpoints": len(live.endpoints),
        }
        return web.json_response(body, status=200 if ready else 503)

    application = web.Application()
    application.add_routes(
        [web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)]
    )
    return application
