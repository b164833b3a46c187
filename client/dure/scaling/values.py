"""What scaling decisions are made of. Times are integer milliseconds of one clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Source(StrEnum):
    INFERENCE_FRAMEWORK = "inference-framework"
    KERNEL = "kernel"
    PROXY = "proxy"


class Comparator(StrEnum):
    LESS_THAN = "LESS_THAN"
    LESS_THAN_OR_EQUAL = "LESS_THAN_OR_EQUAL"
    GREATER_THAN = "GREATER_THAN"
    GREATER_THAN_OR_EQUAL = "GREATER_THAN_OR_EQUAL"


SYMBOLS = {
    Comparator.LESS_THAN: "<",
    Comparator.LESS_THAN_OR_EQUAL: "<=",
    Comparator.GREATER_THAN: ">",
    Comparator.GREATER_THAN_OR_EQUAL: ">=",
}


@dataclass(frozen=True)
class Rule:
    """A scaling rule. `step` is positive to add replicas, negative to remove them; `fired_ms` is 0 before the
    first time. Rules are given in the order of their creation.
    """

    name: str
    source: Source
    metric: str
    comparator: Comparator
    threshold: float
    step: int
    min_replicas: int = 0
    max_replicas: int = 10
    cooldown_ms: int = 300_000
    window_ms: int = 0
    enabled: bool = True
    clamp: bool = False
    fired_ms: int = 0


@dataclass(frozen=True)
class Sample:
    """A metric of an endpoint as it is now: its average over a window (0: the newest value), and how old the
    newest value in it is. `stale_after_ms` is three times the interval at which it is measured.
    """

    value: float
    age_ms: int
    stale_after_ms: int = 3_000


# By source, metric name and window; what is missing was never measured.
Samples = Mapping[tuple[Source, str, int], Sample]


@dataclass(frozen=True)
class Situation:
    """What else a decision looks at.

    `desired` is what the manager keeps now; `idle_ms` how long no request has come, None if that is not known
    (a proxy is away, the manager has just started); `scale_to_zero_ms` is 0 where an endpoint never goes to
    zero by itself; `held` says that requests wait for an endpoint at zero; `proxies_away` that a proxy which
    saw a part of the traffic is not heard of.
    """

    now_ms: int
    desired: int
    idle_ms: int | None = None
    scale_to_zero_ms: int = 0
    held: bool = False
    proxies_away: bool = False


@dataclass(frozen=True)
class Verdict:
    """What one rule saw, and why it fired or not."""

    rule: str
    fired: bool
    value: float | None
    reason: str


@dataclass(frozen=True)
class Decision:
    """`desired` after the decision. `cause` is the name of the rule that fired, `request` (woken), `idle`, or
    empty when nothing changes.
    """

    desired: int
    cause: str = ""
    reason: str = ""
    verdicts: tuple[Verdict, ...] = field(default=())
