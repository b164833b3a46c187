"""Whose turn it is: smooth weighted round robin.

Each turn every party earns its weight, and the one that has most pays the sum of all weights. So of any
W turns in a row, W the sum of the weights, each party gets its weight exactly, spread as evenly as can be.

Not every party can take every turn. A party that is passed over because it cannot must not have the
missed turns made up later, in a burst; and parties that come and go must not set the others back, or one
of a small weight would never have its turn. So each set of parties has a round of its own, which goes on
where it stopped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

# Two parties make one round, three make four, five twenty-six. What is dropped begins anew.
ROUNDS_MAX = 32


class Round:
    """The turns of fixed parties, by weight. Weights are at least 1."""

    def __init__(self, weights: Mapping[int, int]) -> None:
        self._weights = dict(weights)
        self._total = sum(weights.values())
        self._credits = dict.fromkeys(weights, 0)

    def next(self) -> int:
        """The party whose turn it is, and has now been."""
        credits, best = self._credits, -1
        most = -self._total
        for party, weight in self._weights.items():
            credits[party] += weight
            if credits[party] > most:
                best, most = party, credits[party]
        credits[best] -= self._total
        return best

    def reweigh(self, weights: Mapping[int, int]) -> None:
        """Other weights for the same parties; what each is owed stays the same part of a turn."""
        total = sum(weights.values())
        self._credits = {party: credit * total // self._total for party, credit in self._credits.items()}
        # Rounding down took a little from all; together they are owed nothing.
        self._credits[max(self._credits, key=self._credits.__getitem__)] -= sum(self._credits.values())
        self._weights, self._total = dict(weights), total


class Rounds:
    """The rounds of all sets of parties, of which the last used are kept."""

    def __init__(self, weights: Mapping[int, int]) -> None:
        self._weights = dict(weights)
        self._rounds: OrderedDict[frozenset[int], Round] = OrderedDict()

    def next(self, able: Collection[int]) -> int:
        """The one of the `able` parties (at least one) whose turn it is, and has now been."""
        if len(able) == 1:
            return next(iter(able))
        key = frozenset(able)
        if key in self._rounds:
            self._rounds.move_to_end(key)
        else:
            self._rounds[key] = Round(self._of(key))
            if len(self._rounds) > ROUNDS_MAX:
                self._rounds.popitem(last=False)
        return self._rounds[key].next()

    def reweigh(self, weights: Mapping[int, int]) -> None:
        """Takes over who takes part, and by what weight; rounds of those who all stay go on."""
        if weights == self._weights:
            return
        self._weights = dict(weights)
        for key in [key for key in self._rounds if not key <= weights.keys()]:
            del self._rounds[key]
        for key, kept in self._rounds.items():
            kept.reweigh(self._of(key))

    def _of(self, parties: Iterable[int]) -> dict[int, int]:
        return {party: self._weights[party] for party in sorted(parties)}
