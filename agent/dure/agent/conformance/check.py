"""What a check is, and which of them may run at one time."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dure.agent.conformance.stage import Stage


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
