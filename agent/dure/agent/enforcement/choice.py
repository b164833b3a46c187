"""Which mode a device and a kernel get, and what to say and do of what was verified. Nothing here looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dure.wire.enforcement import HOOK, MIG, MODES, MPS, NONE, WATCHDOG, rank

AUTO = "auto"
OPTIONS = (AUTO, MPS, HOOK, WATCHDOG, NONE)
REASON = "ENFORCEMENT_FAILED"
NOT_USED_YET = "none of its processes uses the GPU yet"
# How long a kernel may be without the mode that it requires while it could have it: what was seen may be from
# between two steps of a program's start.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Choice:
    """The mode of a device, and why it is no better than it is; empty if it is what was asked for."""

    mode: str
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """The best mode that is certain for a kernel, and why it is no better. `pending`: a better one was
    prepared, and cannot be looked for before the kernel uses a GPU."""

    mode: str
    detail: str
    pending: bool


def resolve(option: str, has_library: bool) -> str:
    """The mode that the option asks for."""
    if option == AUTO:
        return HOOK if has_library else WATCHDOG
    return option


def candidates(asked: str, has_library: bool, is_part: bool) -> tuple[str, ...]:
    """What to try for a device, best first: what was asked for, and all below that this node has. A part of a
    GPU in MIG mode is kept by the GPU whatever is asked for, and neither MPS nor a hook is for it."""
    if is_part:
        return (MIG, *((WATCHDOG,) if rank(asked) >= rank(WATCHDOG) else ()), NONE)
    there = [mode for mode in reversed(MODES) if mode != MIG and (mode != HOOK or has_library)]
    return tuple(mode for mode in there if rank(mode) <= rank(asked))


def below(mode: str, watched: bool) -> tuple[str, ...]:
    """What may be certain for a kernel that was prepared for `mode`, best first. Being watched needs no
    preparation."""
    found = {mode, NONE} - {WATCHDOG} | ({WATCHDOG} if watched else set())
    return tuple(one for one in reversed(MODES) if one in found)


def choose(tried: Sequence[str], problems: Mapping[str, str]) -> Choice:
    """The first that has no problem. `tried` ends with one that never has."""
    mode = next(mode for mode in tried if not problems.get(mode))
    better = tried[: tried.index(mode)]
    return Choice(mode, "; ".join(f"{one}: {problems[one]}" for one in better))


def weakest(choices: Sequence[Choice]) -> Choice:
    """Of a kernel's devices."""
    return min(choices, key=lambda choice: rank(choice.mode), default=Choice(NONE))


def standing(answers: Sequence[tuple[str, str]], why: str = "") -> Standing:
    """From what each mode, best first, says of itself, empty if it is in force; the last is. `why` tells why
    nothing better was prepared."""
    problems = dict(answers)
    found = choose([mode for mode, _ in answers], problems)
    pending = NOT_USED_YET in [problems[mode] for mode, _ in answers if rank(mode) > rank(found.mode)]
    # What kept a mode from being prepared is why it is not in force.
    told = {part.partition(":")[0] for part in why.split("; ")}
    now = [part for part in found.why.split("; ") if part.partition(":")[0] not in told]
    return Standing(found.mode, "; ".join(part for part in (*now, why) if part), pending)


def lacking_since(
    required: str, now: Standing, can_tell: bool, before_s: float | None, now_s: float
) -> float | None:
    """Since when a kernel is without what it requires, None if it is not. While its devices do not answer
    (`can_tell` is false), nothing is known: what was known stays."""
    if not required or rank(now.mode) >= rank(required):
        return None
    if not can_tell:
        # Counted anew: a hang of the driver must not use up the kernel's time.
        return None if before_s is None else now_s
    if now.pending:
        return None
    return now_s if before_s is None else before_s


def shortfall(required: str, mode: str, detail: str) -> str:
    """The sentence for a kernel that must not run."""
    reason = f" ({detail})" if detail else ""
    return (
        f"it requires enforcement `{required}` of its GPU shares, and this node has `{mode}` for it{reason}; "
        "require less, or let the node's operator see to it"
    )
