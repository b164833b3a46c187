"""Checks and how they end, as values."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dure.agent.conformance.stage import Stage


class Failed(Exception):
    """What a check expected, and what it saw instead."""

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected {expected}; saw {seen}")
        self.expected = expected
        self.seen = seen


class NotApplicable(Exception):
    """Why a check says nothing about this agent."""


class Outcome(enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Result:
    """How one check ended. `expected` and `seen` are set if it failed, `reason` if it did not apply."""

    name: str
    rule: str
    outcome: Outcome
    duration_s: float
    expected: str = ""
    seen: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Check:
    """`rule` is a number of docs/agent-protocol.md. One that is `alone` breaks the stream or the agent, or
    looks at all that happens, so no other runs beside it."""

    name: str
    rule: str
    says: str
    alone: bool
    run: Callable[[Stage], Awaitable[None]]


def check(rule: str, *, alone: bool = False) -> Callable[[Callable[[Stage], Awaitable[None]]], Check]:
    """Makes a check of a function: its name with hyphens, and its docstring is what it says."""

    def make(run: Callable[[Stage], Awaitable[None]]) -> Check:
        says = inspect.cleandoc(run.__doc__ or "")
        return Check(run.__name__.replace("_", "-"), rule, says, alone, run)

    return make


def demand(condition: object, expected: str, seen: object) -> None:
    """Raises Failed unless the condition holds."""
    if not condition:
        raise Failed(expected, str(seen))


def batches(checks: Sequence[Check], most: int) -> list[list[Check]]:
    """In their order; those of one batch may run at the same time."""
    found: list[list[Check]] = []
    for one in checks:
        last = found[-1] if found else []
        if not last or one.alone or last[-1].alone or len(last) == most:
            found.append([one])
        else:
            last.append(one)
    return found
