"""Checks of input that every kind of resource shares; its caller raises all that they find at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dure.wire.errors import InvalidInput, Violation
from dure.wire.quantities import parse_slot, parse_slots

DESCRIPTION_MAX = 1_000


def mask(paths: Sequence[str], updatable: Sequence[str]) -> list[Violation]:
    """An update mask names some of the fields that can be changed, and nothing else."""
    if not paths:
        return [Violation("update_mask", f"is required; name some of {', '.join(updatable)}")]
    return [
        Violation(
            f"update_mask.paths[{index}]",
            f"`{path[:60]}` cannot be changed; those that can are {', '.join(updatable)}",
        )
        for index, path in enumerate(paths)
        if path not in updatable
    ]


def description(text: str, field: str) -> list[Violation]:
    if len(text) > DESCRIPTION_MAX:
        return [Violation(field, f"is longer than {DESCRIPTION_MAX} characters")]
    return []


def slots(asked: Mapping[str, str], field: str, violations: list[Violation]) -> dict[str, int]:
    """Milli-units of slots that are asked for together; adds to the violations."""
    try:
        return parse_slots(asked, field)
    except InvalidInput as error:
        violations.extend(error.violations)
        return {}


def limits(asked: Mapping[str, str], field: str, violations: list[Violation]) -> dict[str, int]:
    """Milli-units of limits, which may be zero and of slots that exclude each other in one request."""
    amounts: dict[str, int] = {}
    for slot, text in asked.items():
        try:
            # "1" is an amount of every slot that there is: it finds the unknown ones.
            nothing = parse_slot(slot, "1") and re.fullmatch(r"0+(\.0+)?", text.strip())
            amounts[slot] = 0 if nothing else parse_slot(slot, text)
        except ValueError as error:
            violations.append(Violation(f"{field}[{slot[:60]}]", str(error)))
    return amounts
