"""Health of one kernel, as a value. Times are seconds since its command started.

Probe k is due at `initial_delay + k * interval`, k = 1, 2, ...; it is sent at the later of that and the
end of the one before. With `probe_during_initial_delay` there are early probes too, at j * interval up
to the end of the delay: their success counts, their failure does not.

    DEGRADED ──success──> HEALTHY ──failures > max_retries──> UNHEALTHY ──success──> HEALTHY
        └──────────────failures > max_retries─────────────────────^

Without a health check the port is tried every 0.2 s until it accepts a connection; failures do not
count until then. Afterwards it is tried every 5 s, and a listener that refused three times in a row is
UNHEALTHY: a model whose server thread died keeps its process alive, and nobody else would notice.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

# Without a health check.
ACCEPT_FIRST_INTERVAL_S = 0.2
ACCEPT_INTERVAL_S = 5.0
ACCEPT_MAX_RETRIES = 2
ACCEPT_MAX_WAIT_S = 2.0


class State(enum.Enum):
    """The values are those of `KernelHealth` on the wire."""

    DEGRADED = 1
    HEALTHY = 2
    UNHEALTHY = 3


@dataclass(frozen=True)
class Policy:
    """How to probe over HTTP. Units are seconds."""

    interval_s: float
    max_retries: int
    max_wait_s: float
    initial_delay_s: float
    probe_during_initial_delay: bool = False


@dataclass(frozen=True)
class Health:
    """State, failures in a row, and which probe is next: the `index`-th early or decisive one."""

    state: State = State.DEGRADED
    failures: int = 0
    early: bool = False
    index: int = 1


def begin(policy: Policy | None) -> Health:
    """Health at the start of the command; no policy stands for trying the port."""
    early = policy is not None and policy.probe_during_initial_delay and _early_count(policy) > 0
    return Health(early=early)


def resume(policy: Policy | None, state: State, failures: int, elapsed_s: float) -> Health:
    """Health of an adopted kernel: its state and count, on the schedule that it always had.

    Probes that fell due while no agent was there are left out: catching up would count an absence of
    the agent as failures of the model.
    """
    if policy is None:
        return Health(state, failures)
    if policy.probe_during_initial_delay:
        index = max(1, math.ceil(elapsed_s / policy.interval_s))
        if index <= _early_count(policy):
            return Health(state, failures, early=True, index=index)
    index = max(1, math.ceil((elapsed_s - policy.initial_delay_s) / policy.interval_s))
    return Health(state, failures, early=False, index=index)


def due_s(policy: Policy | None, health: Health, ended_s: float) -> float:
    """When to send the next probe; `ended_s` is the end of the one before (0 if there is none)."""
    if policy is None:
        if health.index == 1:
            return ended_s
        return ended_s + (ACCEPT_FIRST_INTERVAL_S if health.state is State.DEGRADED else ACCEPT_INTERVAL_S)
    start_s = 0.0 if health.early else policy.initial_delay_s
    return max(ended_s, start_s + health.index * policy.interval_s)


def record(policy: Policy | None, health: Health, success: bool) -> Health:
    """Health after the probe that was next."""
    following = _following(policy, health)
    if success:
        return replace(following, state=State.HEALTHY, failures=0)
    if health.early or (policy is None and health.state is State.DEGRADED):
        return following
    failures = health.failures + 1
    max_retries = policy.max_retries if policy is not None else ACCEPT_MAX_RETRIES
    state = State.UNHEALTHY if failures > max_retries else health.state
    return replace(following, state=state, failures=failures)


def _following(policy: Policy | None, health: Health) -> Health:
    if policy is not None and health.early and health.index >= _early_count(policy):
        return replace(health, early=False, index=1)
    return replace(health, index=health.index + 1)


def _early_count(policy: Policy) -> int:
    # An early probe at the very end of the delay is one interval before the first decisive one.
    return math.floor(policy.initial_delay_s / policy.interval_s + 1e-9)
