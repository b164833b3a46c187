"""The checks, by topic, in the order in which they run."""

from __future__ import annotations

from dure.agent.conformance.check import Check
from dure.agent.conformance.checks import (
    clusters,
    ends,
    files,
    grants,
    logs,
    measures,
    probes,
    restarts,
    starts,
    stream,
    wishes,
)

CHECKS: tuple[Check, ...] = (
    *stream.CHECKS,
    *wishes.CHECKS,
    *starts.CHECKS,
    *files.CHECKS,
    *probes.CHECKS,
    *ends.CHECKS,
    *logs.CHECKS,
    *measures.CHECKS,
    *grants.CHECKS,
    *clusters.CHECKS,
    *restarts.CHECKS,
    *stream.LAST,
)
