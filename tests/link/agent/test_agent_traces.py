"""Starts of kernels as traces, at a real receiver."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agent_fakes import cluster, spec
from otlp_receiver import Span, receiver


def test_starts_are_traced(tmp_path: Path) -> None:
    async def run() -> None:
        async with receiver() as received:
            prefix = ("env", *(f"{name}={value}" for name, value in received.environ.items()))
            async with cluster(tmp_path, prefix=prefix) as (manager, _):

                def is_of(span: Span, uid: str) -> bool:
                    return span.attributes["dure.kernel"] == manager.wire(uid)

                manager.want(spec("k1", "exec sleep 600", health_check=None))
                started = await received.span(lambda span: is_of(span, "k1"))
                assert (started.program, started.name, started.failed) == (
                    "dure-agent",
                    "kernel start",
                    False,
                )
                assert started.attributes["dure.endpoint"] == "e"
                manager.want(spec("k2", ["/does/not/exist"], health_check=None))
                failed = await received.span(lambda span: is_of(span, "k2"))
                assert failed.failed and "/does/not/exist" in failed.message

    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ
    asyncio.run(run())
