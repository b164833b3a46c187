"""Scaling rules: read, written, compared, and what makes one set of them another."""

from __future__ import annotations

from datetime import timedelta

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dure.client.manifest_reader import read_manifests
from dure.client.rule_changes import RulePlan, plan_rules
from dure.client.rule_notation import (
    comparator_of,
    complete,
    decidable,
    direction,
    number_text,
    rule_of,
    rule_text,
    rule_values,
)
from dure.scaling.decide import ordered
from dure.scaling.values import Comparator, Source
from dure.v1 import scaling_pb2
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire.errors import InvalidInput


def rules(text: str) -> list[ScalingRule]:
    [manifest] = read_manifests(f"name: a\nmodel: b\nscaling:\n{text}", "f.yaml")
    assert manifest.rules is not None
    return list(manifest.rules)


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        rules(text)
    return [f"{violation.field} {violation.description}" for violation in caught.value.violations]


def test_one_rule_in_many_words() -> None:
    for line in (
        "{source: kernel, metric: cpu_util, at_most: 20, step: -2}",
        "{type: down, source: kernel, metric: cpu_util, at_most: 20.0, step: 2}",
        "{type: SCALE_DOWN, metric_source: KERNEL, metric_name: cpu_util, comparator: LESS_THAN_OR_EQUAL, "
        'threshold: "20", step_size: -2}',
        '{type: Scale Down, source: kernel, metric: cpu_util, comparator: "<=", threshold: 2e1, step: 2}',
    ):
        [rule] = rules(f"  - {line}")
        assert rule_text(rule) == "kernel cpu_util <= 20: -2, within 0 to 10, cooldown 300s"
        [ours] = decidable([rule])
        assert (ours.name, ours.source, ours.step) == ("rule-1", Source.KERNEL, -2)
        assert (ours.comparator, ours.threshold) == (Comparator.LESS_THAN_OR_EQUAL, 20.0)
        assert (ours.min_replicas, ours.max_replicas, ours.cooldown_ms) == (0, 10, 300_000)


def test_a_step_up_keeps_one_replica_unless_told_otherwise() -> None:
    up, wide = rules(
        "  - {source: proxy, metric: queue, above: 0.5}\n"
        "  - {name: wide, source: proxy, metric: queue, above: 1, min: 12, window: 90, enabled: no, "
        "clamp: yes}\n"
    )
    assert rule_text(up) == "proxy queue > 0.5: +1, within 1 to 10, cooldown 300s"
    assert (
        rule_text(wide)
        == "proxy queue > 1: +1, within 12 to 12, cooldown 300s, window 90s, clamp, switched off"
    )
    said = complete(up)
    assert said.HasField("min_replicas") and (said.min_replicas, said.max_replicas) == (1, 10)
    assert said.enabled and said.cooldown.seconds == 300 and said.type == scaling_pb2.SCALING_TYPE_SCALE_UP
    assert rule_values(said) == rule_values(up)


def test_every_problem_of_rules_at_once() -> None:
    found = problems(
        "  - {metric: x, above: 1}\n"
        "  - {source: gpu, metric: x, above: 1, below: 2}\n"
        "  - {name: Bad, source: proxy, metric: queue, step: 0, cooldown: soon}\n"
        "  - {name: two, source: proxy, metric: queue, comparator: over, min: 5, max: 3}\n"
        "  - {name: two, source: proxy, metric: queue, at_least: .nan, window: 2h}\n"
        "  - {name: six, source: proxy, metric: queue, above: 1, min: 5, max: 3}\n"
        "  - 3\n"
    )
    for line, words in (
        (4, "scaling[0].source is required"),
        (5, "scaling[1].source `gpu` is no source of metrics; known: inference-framework, kernel, proxy"),
        (5, "scaling[1].below stands beside `above`"),
        (6, "scaling[2].name `Bad` is not a name"),
        (6, "scaling[2].step must not be 0"),
        (6, "scaling[2].cooldown `soon` is not a duration"),
        (6, "scaling[2] has no condition"),
        (7, "scaling[3].comparator `over` is no comparator"),
        (7, "scaling[3].threshold is required"),
        (8, "scaling[4].name `two` is in line 7 already"),
        (8, "scaling[4].at_least `.nan` is no number"),
        (8, "scaling[4].window found the text `2h`, expected a duration of at most 3600s"),
        (9, "scaling[5].min is 5, above `max`, which is 3"),
        (10, "scaling[6] found the number `3`, expected a mapping"),
    ):
        assert any(one.startswith(f"f.yaml:{line}: {words}") for one in found), (words, found)


def test_a_rule_key_in_the_wrong_place_is_told_where_it_belongs() -> None:
    with pytest.raises(InvalidInput) as caught:
        read_manifests("name: a\nmodel: b\ncooldown: 3s\n", "f")
    assert "belongs in `scaling[0]`" in str(caught.value)


def test_left_out_and_empty_are_not_the_same() -> None:
    assert read_manifests("{name: a, model: b}", "f")[0].rules is None
    assert read_manifests("{name: a, model: b, scaling: []}", "f")[0].rules == ()


def test_keywords_of_the_library() -> None:
    rule, paths = rule_of({"above": "8.0", "step": -2, "window": timedelta(minutes=1), "min_replicas": 0})
    assert paths == ["comparator", "threshold", "step_size", "window", "min_replicas"]
    assert (rule.threshold, rule.window.seconds, direction(rule)) == ("8", 60, "down")
    assert rule.HasField("min_replicas")
    rule, paths = rule_of({"type": "down", "step": -3, "source": "kernel", "metric": "mem"})
    assert (rule.type, rule.step_size) == (scaling_pb2.SCALING_TYPE_SCALE_DOWN, 3)
    assert paths == ["type", "step_size", "metric_source", "metric_name"]
    with pytest.raises(InvalidInput) as caught:
        rule_of({"above": 1, "below": "two", "source": "gpu"})  # type: ignore[typeddict-item]
    assert [violation.field for violation in caught.value.violations] == ["below", "below", "source"]


@pytest.mark.parametrize("text", ["inf", "-Infinity", "NaN", "", "8 g", "1e40", "0x10"])
def test_a_threshold_is_a_finite_number(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        number_text(text)


def test_numbers_have_one_form() -> None:
    assert [number_text(value) for value in ("8.0", 8, "+8", "0.10", "-0", "1e3", 2.5)] == [
        *("8", "8", "8", "0.1", "0", "1000", "2.5")
    ]
    assert comparator_of("greater than or equal") is comparator_of(">=") is comparator_of("at-least")


def apply(current: list[ScalingRule], plan: RulePlan) -> list[ScalingRule]:
    """What a manager does with the calls."""
    stored = {rule.name: rule for rule in current}
    for step in plan.steps:
        if step.verb == "remove":
            del stored[step.rule.name]
        elif step.verb == "add":
            assert step.rule.name not in stored
            stored[step.rule.name] = step.rule
        else:
            assert step.rule.name in stored and step.paths
            stored[step.rule.name] = step.rule
    return list(stored.values())


def made(name: str, step: int, threshold: int, cooldown: int) -> ScalingRule:
    rule, _ = rule_of(
        {"source": "proxy", "metric": "queue", "above": threshold, "step": step, "cooldown": cooldown}
    )
    rule.name = name
    return rule


RULE = st.builds(
    made,
    st.sampled_from("abcdef"),
    st.sampled_from([-2, -1, 1, 2]),
    st.integers(1, 3),
    st.sampled_from([30, 300]),
)
RULES = st.lists(RULE, max_size=6, unique_by=lambda rule: rule.name)


@given(current=RULES, wanted=RULES)
def test_after_the_plan_rules_are_looked_at_as_the_file_says(
    current: list[ScalingRule], wanted: list[ScalingRule]
) -> None:
    plan = plan_rules(current, wanted)
    after = apply(current, plan)
    assert ordered(decidable(after)) == ordered(decidable(wanted))
    again = plan_rules(after, wanted)
    assert again.steps == () and again.changes == ()
    assert bool(plan.steps) == bool(plan.changes)


def test_a_plan_says_what_changes_and_keeps_what_can_stay() -> None:
    before = rules(
        "  - {name: busy, source: proxy, metric: concurrency, above: 8}\n"
        "  - {name: calm, source: proxy, metric: concurrency, below: 2, step: -1}\n"
        "  - {name: hot, source: kernel, metric: cpu_util, above: 90}\n"
    )
    after = rules(
        "  - {name: calm, source: proxy, metric: concurrency, below: 2, step: -1}\n"
        "  - {name: busy, source: proxy, metric: concurrency, at_least: 9, clamp: true}\n"
        "  - {name: full, source: kernel, metric: mem_util, above: 90}\n"
    )
    plan = plan_rules(before, after)
    # That `calm` stands before `busy` makes no difference: they go different ways.
    assert [(step.verb, step.rule.name) for step in plan.steps] == [
        ("remove", "hot"),
        ("update", "busy"),
        ("add", "full"),
    ]
    assert plan.steps[1].paths == ("comparator", "threshold", "clamp")
    assert [str(change) for change in plan.changes] == [
        "- scaling.hot: kernel cpu_util > 90: +1, within 1 to 10, cooldown 300s",
        "+ scaling.busy.at_least: 9",
        "+ scaling.busy.clamp: true",
        "- scaling.busy.above: 8",
        "+ scaling.full: kernel mem_util > 90: +1, within 1 to 10, cooldown 300s",
    ]


@given(RULES)
def test_what_is_written_reads_back_the_same(wanted: list[ScalingRule]) -> None:
    values = {"name": "a", "model": "b", "scaling": [rule_values(rule) for rule in wanted]}
    [manifest] = read_manifests(yaml.safe_dump(values), "f")
    assert decidable(manifest.rules or ()) == decidable(wanted)
