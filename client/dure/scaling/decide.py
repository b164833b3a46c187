"""Which rule fires, and what it comes to: a function of rules, samples and the clock.

Rules that scale up come before those that scale down, each in the order of their creation; the first that
fires wins, and the rest are still told what they would have seen. A rule does not fire while it is switched
off, within its cooldown, without a value that is fresh and a number, or when its step leads out of its bounds
(unless it clamps). An endpoint at zero is woken by requests, never by a rule's metric alone: at zero there is
nothing to measure but the proxies' view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dure.scaling.values import (
    SYMBOLS,
    Comparator,
    Decision,
    Rule,
    Sample,
    Samples,
    Situation,
    Source,
    Verdict,
)

REPLICAS_MAX = 10_000


def decide(rules: Sequence[Rule], samples: Samples, situation: Situation) -> Decision:
    """The whole decision. `desired` stays as it is unless `cause` is set."""
    now = situation.desired
    if now == 0 and situation.held:
        wanted = min(wake_to(rules), REPLICAS_MAX)
        return Decision(wanted, "request", f"a request came while it was at zero: {wanted} replica(s)")
    verdicts: list[Verdict] = []
    winner: tuple[Rule, int, str] | None = None
    for rule in ordered(rules):
        wanted, verdict = _judge(rule, samples, situation)
        if verdict.fired and winner is not None:
            verdict = Verdict(rule.name, False, verdict.value, f"{winner[0].name} fired before it")
        verdicts.append(verdict)
        if verdict.fired:
            winner = (rule, wanted, verdict.reason)
    if winner is not None:
        rule, wanted, reason = winner
        return Decision(wanted, rule.name, reason, tuple(verdicts))
    idle_ms, limit_ms = situation.idle_ms, situation.scale_to_zero_ms
    if limit_ms and now > 0 and idle_ms is not None and idle_ms >= limit_ms:
        reason = f"no request for {idle_ms / 1000:.0f} s (scale_to_zero_after is {limit_ms / 1000:g} s)"
        return Decision(0, "idle", reason, tuple(verdicts))
    return Decision(now, verdicts=tuple(verdicts), reason=_nothing(verdicts))


def ordered(rules: Sequence[Rule]) -> list[Rule]:
    """In the order in which they are looked at."""
    return [rule for rule in rules if rule.step > 0] + [rule for rule in rules if rule.step < 0]


def wake_to(rules: Sequence[Rule]) -> int:
    """How many replicas a request wakes: the least that a rule keeps, but one at least."""
    return max([1, *(rule.min_replicas for rule in rules if rule.enabled)])


def holds(comparator: Comparator, value: float, threshold: float) -> bool:
    return {
        Comparator.LESS_THAN: value < threshold,
        Comparator.LESS_THAN_OR_EQUAL: value <= threshold,
        Comparator.GREATER_THAN: value > threshold,
        Comparator.GREATER_THAN_OR_EQUAL: value >= threshold,
    }[comparator]


def _judge(rule: Rule, samples: Samples, situation: Situation) -> tuple[int, Verdict]:
    """The replicas that the rule would lead to, and whether it does."""
    now = situation.desired
    sample = samples.get((rule.source, rule.metric, rule.window_ms))
    value = sample.value if sample is not None and math.isfinite(sample.value) else None

    def no(reason: str) -> tuple[int, Verdict]:
        return now, Verdict(rule.name, False, value, reason)

    if not rule.enabled:
        return no("is switched off")
    missing = _missing(rule, sample)
    if missing:
        return no(missing)
    if situation.proxies_away and rule.source is Source.PROXY and rule.step < 0:
        return no("a proxy is away or not back yet, and with it what it saw")
    assert value is not None
    condition = f"{rule.metric} is {value:g}, {'' if _holds(rule, value) else 'not '}{_wanted(rule)}"
    if not _holds(rule, value):
        return no(condition)
    left_ms = rule.fired_ms + rule.cooldown_ms - situation.now_ms
    if rule.fired_ms and left_ms > 0:
        return no(f"{condition}, but it cools down for another {left_ms / 1000:.0f} s")
    if now == 0:
        return no(f"{condition}, but at zero only a request starts a replica")
    wanted = now + rule.step
    bounded = min(max(wanted, rule.min_replicas), rule.max_replicas)
    beyond = f"{wanted} replicas are out of its bounds {rule.min_replicas} to {rule.max_replicas}"
    if wanted != bounded and not rule.clamp:
        return no(f"{condition}, but {beyond}")
    # A clamped step never goes against its own direction: 5 replicas, at most 3, scale up stays at 5.
    if wanted != bounded and (bounded - now) * rule.step <= 0:
        return no(f"{condition}, but {beyond}, and it is there already")
    clamped = f" ({beyond}: it goes to the bound)" if wanted != bounded else ""
    return bounded, Verdict(rule.name, True, value, f"{condition}: {now} -> {bounded} replica(s){clamped}")


def _missing(rule: Rule, sample: Sample | None) -> str:
    if sample is None:
        return f"no value of {rule.metric} ({rule.source.value}) yet"
    if not math.isfinite(sample.value):
        return f"{rule.metric} is {sample.value}, which is no number to decide by"
    if sample.value < 0 and rule.source is not Source.INFERENCE_FRAMEWORK:
        return f"{rule.metric} is {sample.value:g}, which cannot be"
    if sample.age_ms > sample.stale_after_ms:
        return f"the newest value of {rule.metric} is {sample.age_ms / 1000:.1f} s old: too old to decide by"
    return ""


def _holds(rule: Rule, value: float) -> bool:
    return holds(rule.comparator, value, rule.threshold)


def _wanted(rule: Rule) -> str:
    return f"{SYMBOLS[rule.comparator]} {rule.threshold:g}"


def _nothing(verdicts: Sequence[Verdict]) -> str:
    return "no rule fired" if verdicts else "there are no rules"
