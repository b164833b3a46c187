"""How checks end, as values."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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


def demand(condition: object, expected: str, seen: object) -> None:
    """Raises Failed unless the condition holds."""
    if not condition:
        raise Failed(expected, str(seen))
