"""Rules over series, with answers worked out by hand; files of series; recordings; plots."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.client.cli.plot import plot, squeeze
from dure.client.cli.rule_simulate import drawing, summary, values
from dure.client.recording import Recording
from dure.client.rule_notation import rule_of
from dure.client.simulation import Made, Outcome, Scenario, Track, simulate
from dure.client.simulation_file import read_scenario
from dure.scaling.values import Comparator, Rule, Source
from dure.v1 import scaling_pb2
from dure.v1.scaling_pb2 import EndpointMeasurements, Metric
from dure.wire.errors import InvalidInput

ROOT = Path(__file__).parents[3]


def no_file(path: str) -> str:
    raise ValueError(f"{path}: no such file")


def run(text: str, files: dict[str, str] | None = None) -> Outcome:
    return simulate(read_scenario(text, "f.yaml", (files or {}).__getitem__))


def steps(outcome: Outcome) -> list[tuple[int, int, int, str]]:
    return [
        (made.second, made.before, made.decision.desired, made.decision.cause) for made in outcome.decisions
    ]


UP = "{name: up, source: proxy, metric: queue, above: 5, step: 2, cooldown: 30s, max: 6}"
DOWN = "{name: down, source: proxy, metric: queue, below: 1, step: -1, cooldown: 10s, min: 1}"


def test_a_rule_fires_at_once_and_again_after_its_cooldown_until_its_bound() -> None:
    outcome = run(f"rules: [{UP}]\nreplicas: 1\nseconds: 200\nseries:\n  queue: [[0, 5], [10, 6]]")
    # 1 -> 3 -> 5; 7 would be beyond 6, so it stays.
    assert steps(outcome) == [(10, 1, 3, "up"), (40, 3, 5, "up")]
    assert outcome.final == 5
    assert "out of its bounds 1 to 6" in outcome.newest.verdicts[0].reason


def test_with_clamp_it_goes_to_the_bound() -> None:
    rule = UP.replace("}", ", clamp: true}")
    outcome = run(f"rules: [{rule}]\nseconds: 100\nseries:\n  queue: [[0, 6]]")
    assert steps(outcome) == [(0, 1, 3, "up"), (30, 3, 5, "up"), (60, 5, 6, "up")]


def test_up_goes_before_down_and_down_one_by_one() -> None:
    outcome = run(
        f"rules: [{DOWN}, {UP}]\nreplicas: 4\nseconds: 40\nseries:\n  queue: [[0, 0], [5, 9], [6, 0]]"
    )
    assert steps(outcome) == [
        (0, 4, 3, "down"),
        (5, 3, 5, "up"),
        (10, 5, 4, "down"),
        (20, 4, 3, "down"),
        (30, 3, 2, "down"),
        (40, 2, 1, "down"),
    ]


def test_a_window_averages_and_keeps_a_spike_from_deciding() -> None:
    series = "series:\n  queue: [[0, 0], [20, 30], [22, 0]]"
    rule = UP.replace("}", ", window: 10s}")
    # Two seconds of 30 in ten are 6 on average: above 5 from the second of them until one has left.
    assert steps(run(f"rules: [{rule}]\nseconds: 60\n{series}")) == [(21, 1, 3, "up")]
    # In twenty they are 3.
    assert steps(run(f"rules: [{UP.replace('}', ', window: 20s}')}]\nseconds: 60\n{series}")) == []


def test_no_value_an_absurd_one_and_a_stale_one_scale_nothing() -> None:
    rule = UP.replace("proxy", "kernel").replace("queue", "mem")
    for points in ("[[0, .nan]]", "[[0, .inf]]", "[[0, -.inf]]", "[[50, null]]"):
        outcome = run(f"rules: [{rule}]\nseconds: 60\nseries:\n  mem: {points}")
        assert steps(outcome) == [], points
        assert "no value" in outcome.newest.verdicts[0].reason
    # It is measured once more than three seconds old, then too old to decide by.
    outcome = run(f"rules: [{rule}]\nreplicas: 1\nseconds: 60\nseries:\n  mem: [[0, 9], [2, null]]")
    assert steps(outcome) == [(0, 1, 3, "up")]
    assert "too old to decide by" in outcome.newest.verdicts[0].reason


def test_a_shared_series_is_divided_by_the_replicas_that_serve() -> None:
    text = (
        f"rules: [{UP.replace('30s', '5s')}]\nseconds: 60\nready_after: 20s\n"
        "series:\n  queue: {shared: true, points: [[0, 18]]}"
    )
    outcome = run(text)
    # While they start nothing is relieved: 1 -> 3 -> 5; once three serve, 6 each is still above 5: 7 is out.
    assert steps(outcome) == [(0, 1, 3, "up"), (5, 3, 5, "up")]
    ready = [moment.ready for moment in outcome.moments]
    assert (ready[19], ready[20], ready[24], ready[25]) == (1, 3, 3, 5)
    seen = [moment.values[Source.PROXY, "queue"] for moment in outcome.moments]
    assert (seen[19], seen[20], seen[25]) == (18, 6, 18 / 5)


def test_those_that_start_are_the_first_to_go() -> None:
    outcome = run(
        "rules:\n"
        "  - {name: up, source: proxy, metric: queue, above: 5, step: 3, cooldown: 100s}\n"
        "  - {name: down, source: proxy, metric: queue, below: 1, step: -2, cooldown: 100s, min: 1}\n"
        "replicas: 2\nready_after: 50s\nseconds: 80\nseries:\n  queue: [[0, 6], [10, 0]]"
    )
    assert steps(outcome) == [(0, 2, 5, "up"), (10, 5, 3, "down")]
    assert [outcome.moments[second].ready for second in (9, 10, 49, 50)] == [2, 2, 2, 3]


def test_to_zero_when_idle_and_back_by_a_request() -> None:
    text = (
        f"rules: [{UP.replace('max', 'min: 2, max')}]\nseconds: 100\nscale_to_zero_after: 30s\n"
        "series:\n  proxy/requests_per_second: [[0, 2], [10, 0], [70, 1]]\n"
    )
    # Until second 9 there were requests: 30 s without one are over at 39. Two is the least that a rule keeps.
    assert steps(run(text)) == [(39, 1, 0, "idle"), (70, 0, 2, "request")]


def test_without_a_series_of_requests_nobody_knows_that_it_is_idle() -> None:
    rule = UP.replace("proxy", "kernel").replace("queue", "mem")
    text = f"rules: [{rule}]\nseconds: 100\nscale_to_zero_after: 30s\nseries:\n  mem: [[0, 1]]\n"
    assert steps(run(text)) == []


def test_the_example_of_the_manual_does_what_the_manual_says() -> None:
    manual = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    text = next(part for part in manual.split("```yaml\n") if part.startswith("rules:")).split("```")[0]
    outcome = run(text)
    shown = manual.split("$ dure rule simulate")[1].split("```")[0]
    for made in outcome.decisions:
        line = f"{made.second}s"
        assert any(
            row.startswith(line)
            and f"{made.before} -> {made.decision.desired}" in row
            and made.decision.reason in row
            for row in shown.splitlines()
        ), made
    assert summary(read_scenario(text, "f", no_file), outcome) in shown


def test_csv_files_texts_and_columns() -> None:
    rules = f"rules: [{UP}, {DOWN}]\nseconds: 60\n"
    for series, files in (
        ("queue: q.csv", {"q.csv": "seconds,value\n0,0\n# later\n20,6\n\n"}),
        ("queue: q.csv", {"q.csv": "time,other,queue\n0,9,0\n20,9,6\n"}),
        ("queue: |\n    0,0\n    20,6\n", {}),
        ("proxy/queue: {points: '0,0\n\n      20, 6'}", {}),
    ):
        found = steps(run(f"{rules}series:\n  {series}", files))
        assert found == [(20, 1, 3, "up"), (50, 3, 5, "up")], series


def test_every_problem_of_a_file_at_once() -> None:
    text = (
        f"rules: [{UP}, {{source: kernel, metric: mem, above: 1}}]\n"
        "replicas: many\nseconds: 0\nready: 3\nready_after: later\n"
        "series:\n"
        "  other: [[0, 1]]\n"
        "  gpu/x: [[0, 1]]\n"
        "  queue: gone.csv\n"
        "  mem: |\n    0,1\n    x,2\n"
        "  proxy/a: [[0, 1], [0, 2]]\n"
        "  proxy/b: [[0, up], [1], 3]\n"
        "  proxy/c: []\n"
        "  proxy/d: {shared: 3}\n"
        "  proxy/queue: [[0, 1]]\n"
    )
    with pytest.raises(InvalidInput) as caught:
        read_scenario(text, "f.yaml", no_file)
    found = [f"{violation.field} {violation.description}" for violation in caught.value.violations]
    for words in (
        "replicas found the text `many`",
        "f.yaml:3: seconds found the number `0`",
        "f.yaml:4: ready unknown key; did you mean `ready_after`?",
        "ready_after `later` is not a duration",
        "series.other whose metric is it?",
        "series.gpu/x `gpu` is no source",
        "series.queue gone.csv: no such file",
        "series.mem line 2: found `x,2`, expected SECONDS,VALUE",
        "series.proxy/a seconds must ascend: 0 comes after 0",
        "series.proxy/b[0] found the text `up`, expected a number, or null for none",
        "series.proxy/b[1] has 1 values, expected two",
        "series.proxy/b[2] found the number `3`, expected a list",
        "series.proxy/c has no values",
        "series.proxy/d.shared found the number `3`",
        "series.proxy/d.points is required",
    ):
        assert any(words in one for one in found), (words, found)


def test_a_rule_of_an_endpoint_takes_the_place_of_the_files() -> None:
    rule, _ = rule_of({"source": "kernel", "metric": "mem", "above": 3, "step": 4})
    rule.name = "projects/p/endpoints/e/rules/big"
    scenario = read_scenario("series:\n  mem: [[0, 9]]\nseconds: 5", "f", no_file, rules=[rule])
    assert steps(simulate(scenario)) == [(0, 1, 5, "big")]
    with pytest.raises(InvalidInput, match="rules: is required, unless --rules-of"):
        read_scenario("series: {kernel/mem: [[0, 9]]}", "f", no_file)


def measured(rps: float, concurrency: float, **scraped: float) -> tuple[list[Metric], EndpointMeasurements]:
    """As two replicas would be."""
    proxy, framework = scaling_pb2.METRIC_SOURCE_PROXY, scaling_pb2.METRIC_SOURCE_INFERENCE_FRAMEWORK
    metrics = [
        Metric(source=proxy, name="requests_per_second", value=rps / 2),
        Metric(source=proxy, name="concurrency", value=concurrency / 2),
        *(Metric(source=framework, name=f"vllm:{name}", value=value) for name, value in scraped.items()),
    ]
    return metrics, EndpointMeasurements(requests_per_second=rps, concurrency=concurrency)


def test_a_recording_reads_back_as_it_was_measured() -> None:
    recording = Recording()
    recording.add(0.0, *measured(10, 4, waiting=1))
    recording.add(1.0, *measured(10, 6, waiting=math.nan))
    recording.add(2.0, [], EndpointMeasurements())
    stale = measured(3, 3)
    for metric in stale[0]:
        metric.age.FromSeconds(60)
    recording.add(3.0, *stale)
    recording.add(4.1, *measured(10, 6))
    rule, _ = rule_of({"source": "proxy", "metric": "concurrency", "above": 2.5, "step": 1})
    rule.name = "busy"
    text = recording.text([rule], 2, 9.7, 300.0)
    scenario = read_scenario(text, "f", no_file)
    assert (scenario.replicas, scenario.seconds, scenario.scale_to_zero_s) == (2, 10, 300.0)
    assert [one.name for one in scenario.rules] == ["busy"]
    assert scenario.tracks == {
        (Source.PROXY, "concurrency"): Track((0, 1, 2, 4.1), (4, 6, None, 6), shared=True),
        (Source.PROXY, "requests_per_second"): Track((0, 2, 4.1), (10, None, 10), shared=True),
        (Source.INFERENCE_FRAMEWORK, "vllm:waiting"): Track((0, 1), (1, None)),
    }
    # Rules saw the half of six: so do they in the replay, and at three replicas it is two.
    assert steps(simulate(scenario)) == [(1, 2, 3, "busy")]


def test_a_recording_keeps_what_is_wanted() -> None:
    recording = Recording({"proxy/concurrency", "vllm:waiting"})
    recording.add(0.0, *measured(10, 4, waiting=1, running=2))
    assert sorted(recording.series) == ["inference-framework/vllm:waiting", "proxy/concurrency"]
    assert Recording().text([], 1, 0.0, 0.0).endswith("series: {}\n")


def test_values_and_drawing_of_an_outcome() -> None:
    text = f"rules: [{UP}]\nseconds: 100\nseries:\n  queue: {{shared: true, points: [[0, 0], [50, 12]]}}"
    scenario = read_scenario(text, "f", no_file)
    outcome = simulate(scenario)
    document = values(scenario, outcome)
    assert document["final_replicas"] == 3 and document["replica_seconds"] == 50 + 51 * 3
    assert document["timeline"] == [
        {"second": 0, "desired": 1, "ready": 1, "proxy/queue": 0.0},
        {"second": 50, "desired": 3, "ready": 3, "proxy/queue": 12.0},
        {"second": 51, "desired": 3, "ready": 3, "proxy/queue": 4.0},
    ]
    page = drawing(scenario, outcome, 60)
    assert "proxy/queue of each replica" in page and page[-1].endswith("100 s")
    assert max(len(line) for line in page) <= 60
    assert any("·" in line for line in page)


def test_a_plot_scales_to_its_highest_and_marks_thresholds() -> None:
    lines = plot("t", [0, 4, 8], width=30, height=4, marks=[4])
    assert [line[:11] for line in lines] == ["t", "        8 │", "          │", "          │", "        0 │"]
    # Half of eight fills two of four rows, and the dots of the threshold stand where nothing else does.
    assert lines[1].count("█") == 6 and lines[3].count("█") == 12 and lines[2].count("·") == 13
    assert lines[4].endswith("█") and plot("t", [], width=30)[0] == "t"
    assert plot("t", [None, 0.0, None], width=30, height=1)[1].strip() == "1 │"


@given(st.lists(st.none() | st.floats(), max_size=60), st.integers(1, 80))
def test_squeezing_keeps_the_highest(series: list[float | None], width: int) -> None:
    columns = squeeze(series, width)
    finite = [value for value in series if value is not None and math.isfinite(value)]
    assert len(columns) == (width if series else 0)
    assert max((value for value in columns if value is not None), default=None) == max(finite, default=None)
    for line in plot("t", series, width=width):
        assert "nan" not in line


RULE = st.builds(
    Rule,
    name=st.sampled_from(["a", "b", "c"]),
    source=st.just(Source.PROXY),
    metric=st.just("queue"),
    comparator=st.sampled_from(list(Comparator)),
    threshold=st.floats(-5, 20),
    step=st.integers(-5, 5).filter(bool),
    min_replicas=st.integers(0, 3),
    max_replicas=st.integers(3, 12),
    cooldown_ms=st.integers(0, 30_000),
    window_ms=st.sampled_from([0, 5_000, 20_000]),
    clamp=st.booleans(),
)


@given(
    rules=st.lists(RULE, max_size=3, unique_by=lambda rule: rule.name),
    points=st.lists(st.none() | st.floats(), min_size=1, max_size=20),
    replicas=st.integers(0, 12),
    ready_after_s=st.integers(0, 15),
    scale_to_zero_s=st.sampled_from([0.0, 7.0]),
    shared=st.booleans(),
)
def test_whatever_is_measured_bounds_and_cooldowns_hold(
    rules: list[Rule],
    points: list[float | None],
    replicas: int,
    ready_after_s: int,
    scale_to_zero_s: float,
    shared: bool,
) -> None:
    track = Track(tuple(3.0 * index for index in range(len(points))), tuple(points), shared)
    tracks = {(Source.PROXY, "queue"): track}
    outcome = simulate(Scenario(tuple(rules), tracks, replicas, 60, ready_after_s, scale_to_zero_s))
    assert all(moment.ready >= 0 and moment.desired >= 0 for moment in outcome.moments)
    by_name = {rule.name: rule for rule in rules}
    fired: dict[str, Made] = {}
    for made in outcome.decisions:
        rule = by_name.get(made.decision.cause)
        if rule is None:
            assert made.decision.cause in ("idle", "request")
            continue
        assert rule.min_replicas <= made.decision.desired <= rule.max_replicas
        assert (made.decision.desired - made.before) * rule.step > 0
        if rule.name in fired:
            assert (made.second - fired[rule.name].second) * 1000 >= rule.cooldown_ms
        fired[rule.name] = made
    assert max(0, *(moment.ready - max(moment.desired, 0) for moment in outcome.moments)) == 0
