"""Which lines of a log were shown already, so that reading it once more shows none of them twice."""

from __future__ import annotations


class LinesSeen:
    """Of one log, whose times never decrease (they come from one clock). Keeps a time and a count only."""

    def __init__(self) -> None:
        self._newest_ms = 0
        self._at_newest = 0
        self._counted = 0

    def begin_again(self) -> None:
        """The log is read from an earlier place once more."""
        self._counted = 0

    def is_new(self, time_ms: int) -> bool:
        """Whether the next line is one that was not shown; it counts as shown from now on."""
        if time_ms < self._newest_ms:
            return False
        if time_ms > self._newest_ms:
            self._newest_ms, self._at_newest, self._counted = time_ms, 1, 1
            return True
        self._counted += 1
        if self._counted <= self._at_newest:
            return False
        self._at_newest = self._counted
        return True
