"""A kernel's start while it is under way: how long it takes, and its trace."""

from __future__ import annotations

import time

from dure.agent.counts import Counts
from dure.fleet.v1 import fleet_pb2
from dure.wire.tracing import Tracing


class Start:
    """From taking a kernel up to its command running."""

    def __init__(self, counts: Counts, tracing: Tracing | None, spec: fleet_pb2.KernelSpec) -> None:
        self._counts = counts
        self._tracing = tracing
        self._began_s = time.monotonic()
        if tracing is not None:
            described = {
                "dure.kernel": spec.uid,
                "dure.replica": spec.replica_uid,
                "dure.project": spec.project,
                "dure.endpoint": spec.endpoint,
            }
            self._span = tracing.begin("kernel start", "internal", described)

    def over(self, error: str) -> None:
        """Empty: its command runs."""
        if not error:
            self._counts.started.observe(time.monotonic() - self._began_s)
        if self._tracing is not None:
            self._tracing.end(self._span, error[:200])
