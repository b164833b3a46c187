"""What keeps a kernel within its parts of devices: the modes, each better than those before it."""

from __future__ import annotations

from collections.abc import Iterable

NONE, WATCHDOG, HOOK, MPS, MIG = "none", "watchdog", "hook", "mps", "mig"
MODES = (NONE, WATCHDOG, HOOK, MPS, MIG)


def rank(mode: str) -> int:
    """Grows with what a mode guarantees. Of one that is not known nothing is expected."""
    return MODES.index(mode) if mode in MODES else 0


def least(modes: Iterable[str]) -> str:
    """The weakest; empty without any, and while one of them has yet to be found out."""
    return min(modes, key=lambda mode: (rank(mode), mode != ""), default="")
