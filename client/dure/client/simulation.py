"""What rules would have done over series: the manager's decisions under a clock of their own. Pure.

Once a second every series gives the value that it has then (a value holds until the next one; None: nothing
is measured any more), and `dure.scaling.decide` is asked, as the manager asks it. A series that is `shared`
is a total, and rules see it divided by the replicas that serve; so that what they do changes what they see.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dure.scaling.decide import decide
from dure.scaling.series import WINDOW_MS_MAX, Series
from dure.scaling.values import Decision, Rule, Sample, Situation, Source

SECONDS_MAX = 86_400
# As the manager has it: how old a value may be to be decided by.
STALE_AFTER_MS = {Source.PROXY: 15_000, Source.INFERENCE_FRAMEWORK: 3_000, Source.KERNEL: 3_000}
# Any of these above zero is a request; they are totals of all proxies.
_REQUESTS = ("requests_per_second", "concurrency", "queue")
# Not zero: a rule that fired at zero would be one that never fired.
_BEGIN_MS = 1_000_000

Key = tuple[Source, str]


@dataclass(frozen=True)
class Track:
    """A series: seconds and values, ascending."""

    seconds: tuple[float, ...]
    values: tuple[float | None, ...]
    shared: bool = False

    def at(self, second: float) -> float | None:
        index = bisect_right(self.seconds, second)
        return self.values[index - 1] if index else None


@dataclass(frozen=True)
class Scenario:
    """`ready_after_s` is how long a replica takes to serve; `scale_to_zero_s` 0: never to zero."""

    rules: tuple[Rule, ...]
    tracks: Mapping[Key, Track]
    replicas: int = 1
    seconds: int = 0
    ready_after_s: int = 0
    scale_to_zero_s: float = 0.0


@dataclass(frozen=True)
class Moment:
    """One second: desired replicas after the decision, those that serve, and what rules saw."""

    second: int
    desired: int
    ready: int
    values: Mapping[Key, float | None]


@dataclass(frozen=True)
class Made:
    """A decision that changed something."""

    second: int
    before: int
    decision: Decision


@dataclass(frozen=True)
class Outcome:
    moments: tuple[Moment, ...]
    decisions: tuple[Made, ...]
    newest: Decision = field(default_factory=lambda: Decision(0))

    @property
    def final(self) -> int:
        return self.moments[-1].desired if self.moments else 0

    @property
    def replica_seconds(self) -> int:
        return sum(moment.desired for moment in self.moments)


def length_s(tracks: Mapping[Key, Track]) -> int:
    """Until the last value of any series."""
    last = max((track.seconds[-1] for track in tracks.values() if track.seconds), default=0.0)
    return min(int(last), SECONDS_MAX)


def simulate(scenario: Scenario) -> Outcome:
    rules = list(scenario.rules)
    series = {key: Series(keep_ms=_kept_ms(rules, key)) for key in scenario.tracks}
    desired = scenario.replicas
    # Those that were asked for and do not serve yet, by the second in which they will.
    starting: deque[tuple[int, int]] = deque()
    ready, idle_since = desired, 0
    moments: list[Moment] = []
    made: list[Made] = []
    decision = Decision(desired)
    for second in range(min(scenario.seconds, SECONDS_MAX) + 1):
        now_ms = _BEGIN_MS + second * 1000
        while starting and starting[0][0] <= second:
            ready += starting.popleft()[1]
        values = {key: _value(track, second, ready) for key, track in scenario.tracks.items()}
        for key, value in values.items():
            if value is not None:
                series[key].add(now_ms, value)
        asked = _requests(scenario.tracks, second)
        if asked is None or asked:
            idle_since = second
        situation = Situation(
            now_ms,
            desired,
            idle_ms=None if asked is None else (second - idle_since) * 1000,
            scale_to_zero_ms=round(scenario.scale_to_zero_s * 1000),
            held=desired == 0 and bool(asked),
        )
        decision = decide(rules, _samples(rules, series, now_ms), situation)
        if decision.desired != desired:
            made.append(Made(second, desired, decision))
            rules = [
                replace(rule, fired_ms=now_ms) if rule.name == decision.cause else rule for rule in rules
            ]
            change = decision.desired - desired
            ready = _scaled(starting, ready, change, second, second + scenario.ready_after_s)
            desired = decision.desired
        moments.append(Moment(second, desired, ready, values))
    return Outcome(tuple(moments), tuple(made), decision)


def _kept_ms(rules: Sequence[Rule], key: Key) -> int:
    """As much as its longest window needs."""
    windows = [rule.window_ms for rule in rules if (rule.source, rule.metric) == key]
    return min(max([1000, *windows]), WINDOW_MS_MAX)


def _value(track: Track, second: int, ready: int) -> float | None:
    value = track.at(second)
    return value / max(ready, 1) if value is not None and track.shared else value


def _requests(tracks: Mapping[Key, Track], second: int) -> bool | None:
    """Whether requests come; None where no series tells."""
    found = [tracks[Source.PROXY, name].at(second) for name in _REQUESTS if (Source.PROXY, name) in tracks]
    known = [value for value in found if value is not None]
    return any(value > 0 for value in known) if known else None


def _samples(
    rules: Sequence[Rule], series: Mapping[Key, Series], now_ms: int
) -> dict[tuple[Source, str, int], Sample]:
    samples = {}
    # Rules often share a metric: an average over an hour is taken once.
    for source, metric, window_ms in {(rule.source, rule.metric, rule.window_ms) for rule in rules}:
        found = series.get((source, metric))
        over = found.over(now_ms, window_ms) if found is not None else None
        if over is not None:
            samples[source, metric, window_ms] = Sample(*over, STALE_AFTER_MS[source])
    return samples


def _scaled(starting: deque[tuple[int, int]], ready: int, change: int, second: int, ready_at: int) -> int:
    """How many serve after the change: new ones later, and those that start are the first to go."""
    if change > 0:
        if ready_at <= second:
            return ready + change
        starting.append((ready_at, change))
        return ready
    left = -change
    while left and starting:
        at, count = starting.pop()
        stopped = min(count, left)
        left -= stopped
        if count > stopped:
            starting.append((at, count - stopped))
    return ready - left
