"""What the suite found, for people and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from dure.agent.conformance.check import Check
from dure.agent.conformance.outcome import Outcome, Result
from dure.fleet.v1 import fleet_pb2

_COLORS = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.NOT_APPLICABLE: "yellow"}
_WORD_WIDTH = max(len(outcome.value) for outcome in Outcome)


def line(result: Result, name_width: int) -> str:
    """A result, with what was expected and seen below it."""
    word = click.style(result.outcome.value.ljust(_WORD_WIDTH), fg=_COLORS[result.outcome])
    text = f"{word}  {result.name.ljust(name_width)}  {result.rule:<5}{result.duration_s:6.1f} s"
    if result.outcome is Outcome.FAILED:
        text += f"\n    expected {result.expected}\n    saw {_indented(result.seen)}"
        text += f"\n    rule {result.rule} of docs/agent-protocol.md"
    elif result.reason:
        text += f"\n    {_indented(result.reason)}"
    return text


def summary(results: Sequence[Result]) -> str:
    counted = Counter(result.outcome for result in results)
    return ", ".join(f"{counted[outcome]} {outcome.value}" for outcome in Outcome)


def document(hello: fleet_pb2.Hello | None, results: Sequence[Result]) -> dict[str, Any]:
    """For programs."""
    counted = Counter(result.outcome for result in results)
    agent: dict[str, Any] = {}
    if hello is not None:
        agent = {
            "version": hello.version,
            "backend": hello.backend,
            "protocol_version": hello.protocol_version,
            "runs_images": hello.runs_images,
            "limitations": list(hello.limitations),
        }
    return {
        "agent": agent,
        **{_key(outcome): counted[outcome] for outcome in Outcome},
        "checks": [
            {
                "name": result.name,
                "rule": result.rule,
                "outcome": _key(result.outcome),
                "duration_s": round(result.duration_s, 3),
                "expected": result.expected,
                "seen": result.seen,
                "reason": result.reason,
            }
            for result in results
        ],
    }


def listed(checks: Sequence[Check]) -> list[str]:
    """All checks, for people."""
    width = max(len(check.name) for check in checks)
    return [f"{check.name.ljust(width)}  {check.rule:<5} {_joined(check.says)}" for check in checks]


def listing(checks: Sequence[Check]) -> list[dict[str, str]]:
    """All checks, for programs."""
    return [{"name": check.name, "rule": check.rule, "says": _joined(check.says)} for check in checks]


def _key(outcome: Outcome) -> str:
    return outcome.name.lower()


def _joined(text: str) -> str:
    return " ".join(text.split())


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n      ")
