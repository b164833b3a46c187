"""Scaling decisions with known answers, and what must never happen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.scaling.decide import decide, ordered, wake_to
from dure.scaling.values import Comparator, Rule, Sample, Samples, Situation, Source

UP = Rule("up", Source.PROXY, "concurrency", Comparator.GREATER_THAN, 10, 2, 1, 6, cooldown_ms=60_000)
DOWN = Rule("down", Source.PROXY, "concurrency", Comparator.LESS_THAN, 2, -1, 1, 6, cooldown_ms=60_000)


def seen(value: float, age_ms: int = 500, **others: float) -> Samples:
    found = {(Source.PROXY, "concurrency", 0): Sample(value, age_ms)}
    return found | {(Source.PROXY, name, 0): Sample(number, age_ms) for name, number in others.items()}


def at(desired: int, now_ms: int = 1_000_000, **fields: object) -> Situation:
    return Situation(now_ms, desired, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("comparator", "below", "equal", "above"),
    [
        (Comparator.LESS_THAN, True, False, False),
        (Comparator.LESS_THAN_OR_EQUAL, True, True, False),
        (Comparator.GREATER_THAN, False, False, True),
        (Comparator.GREATER_THAN_OR_EQUAL, False, True, True),
    ],
)
def test_the_four_comparators(comparator: Comparator, below: bool, equal: bool, above: bool) -> None:
    rule = replace(UP, comparator=comparator, threshold=5)
    fired = [decide([rule], seen(value), at(1)).cause == "up" for value in (4.9, 5, 5.1)]
    assert fired == [below, equal, above]


def test_both_signs_of_the_step() -> None:
    assert decide([UP, DOWN], seen(11), at(2)).desired == 4
    assert decide([UP, DOWN], seen(1), at(2)).desired == 1
    nothing = decide([UP, DOWN], seen(5), at(2))
    assert (nothing.desired, nothing.cause) == (2, "")
    assert [verdict.fired for verdict in nothing.verdicts] == [False, False]
    assert nothing.verdicts[0].reason == "concurrency is 5, not > 10"


def test_the_first_that_fires_wins_and_up_comes_before_down() -> None:
    always = replace(DOWN, name="always", comparator=Comparator.GREATER_THAN, threshold=0)
    later = replace(UP, name="later", threshold=5, step=4)
    decision = decide([always, UP, later], seen(11), at(2))
    assert (decision.cause, decision.desired) == ("up", 4)
    assert [verdict.rule for verdict in decision.verdicts] == ["up", "later", "always"]
    assert [verdict.reason for verdict in decision.verdicts[1:]] == ["up fired before it"] * 2
    assert [rule.name for rule in ordered([always, UP, later])] == ["up", "later", "always"]


def test_out_of_bounds_it_does_not_fire_unless_it_clamps() -> None:
    decision = decide([UP], seen(11), at(5))
    assert decision.desired == 5
    assert "7 replicas are out of its bounds 1 to 6" in decision.verdicts[0].reason
    clamping = replace(UP, clamp=True)
    assert decide([clamping], seen(11), at(5)).desired == 6
    assert decide([clamping], seen(11), at(6)).cause == ""
    assert decide([clamping], seen(11), at(9)).cause == "", "scaling up never makes fewer"


def test_a_cooldown_counts_from_when_it_fired_and_for_its_rule_only() -> None:
    fired = replace(UP, fired_ms=950_000)
    assert "cools down for another 10 s" in decide([fired], seen(11), at(2)).verdicts[0].reason
    assert decide([fired], seen(11), at(2, now_ms=1_010_000)).cause == "up"
    assert decide([fired, DOWN], seen(1), at(2)).cause == "down"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_what_is_absurd_never_scales(value: float) -> None:
    rules = [UP, DOWN, replace(UP, name="any", comparator=Comparator.LESS_THAN, threshold=1e18)]
    assert decide(rules, seen(value), at(3)).cause == ""


def test_missing_and_stale_metrics_never_scale() -> None:
    missing = decide([UP, DOWN], {}, at(3))
    assert (missing.cause, missing.verdicts[0].reason) == ("", "no value of concurrency (proxy) yet")
    stale = decide([UP, DOWN], seen(0, age_ms=3_001), at(3))
    assert (stale.cause, "too old" in stale.verdicts[1].reason) == ("", True)


def test_a_proxy_that_is_away_stops_scaling_down_only() -> None:
    assert decide([UP, DOWN], seen(1), at(3, proxies_away=True)).cause == ""
    assert decide([UP, DOWN], seen(11), at(3, proxies_away=True)).cause == "up"


def test_zero_is_left_by_requests_only() -> None:
    assert decide([UP], seen(11), at(0)).cause == ""
    woken = decide([UP, replace(DOWN, min_replicas=3)], seen(0), at(0, held=True))
    assert (woken.desired, woken.cause) == (3, "request")
    assert wake_to([]) == 1
    assert wake_to([replace(DOWN, min_replicas=3, enabled=False)]) == 1


def test_idle_endpoints_go_to_zero_only_if_they_are_told_to() -> None:
    assert decide([], {}, at(2, idle_ms=10**9)).cause == ""
    assert decide([], {}, at(2, idle_ms=59_999, scale_to_zero_ms=60_000)).cause == ""
    idle = decide([], {}, at(2, idle_ms=60_000, scale_to_zero_ms=60_000))
    assert (idle.desired, idle.cause) == (0, "idle")
    assert decide([], {}, at(2, idle_ms=None, scale_to_zero_ms=60_000)).cause == ""


rules = st.lists(
    st.builds(
        Rule,
        st.sampled_from(["a", "b", "c", "d"]),
        st.just(Source.PROXY),
        st.sampled_from(["concurrency", "queue"]),
        st.sampled_from(list(Comparator)),
        st.floats(-5, 50),
        st.integers(-4, 4).filter(bool),
        st.integers(0, 5),
        st.integers(5, 9),
        st.integers(0, 100_000),
        st.just(0),
        st.booleans(),
        st.booleans(),
        st.integers(0, 1_000_000),
    ),
    max_size=6,
)


@given(rules, st.floats(allow_nan=True), st.floats(allow_nan=True), st.integers(0, 12), st.booleans())
def test_whatever_the_rules_and_the_numbers_are(
    found: list[Rule], first: float, second: float, desired: int, held: bool
) -> None:
    decision = decide(found, seen(first, queue=second), at(desired, held=held))
    if not decision.cause:
        assert decision.desired == desired
        return
    if decision.cause == "request":
        assert desired == 0 and held and decision.desired >= 1
        return
    fired = [verdict for verdict in decision.verdicts if verdict.fired]
    assert [verdict.rule for verdict in fired] == [decision.cause]
    winners = [rule for rule in found if rule.name == decision.cause and rule.enabled]
    assert any(
        rule.min_replicas <= decision.desired <= rule.max_replicas
        and (decision.desired - desired) * rule.step > 0
        for rule in winners
    )
