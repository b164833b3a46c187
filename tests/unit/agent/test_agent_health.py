"""Health with a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hypothesis import given
from hypothesis import strategies as st

from dure.agent import health
from dure.agent.health import Health, Policy, State

DEFAULTS = Policy(interval_s=10.0, max_retries=10, max_wait_s=15.0, initial_delay_s=60.0)


def probes(
    policy: Policy | None,
    answer: Callable[[float], tuple[bool, float]],
    until_s: float,
    current: Health | None = None,
    ended_s: float = 0.0,
) -> Iterator[tuple[float, float, Health]]:
    """Sent, ended, health after it. `answer(sent)` tells whether it succeeds and how long it takes."""
    current = current or health.begin(policy)
    while (sent_s := health.due_s(policy, current, ended_s)) <= until_s:
        success, took_s = answer(sent_s)
        ended_s = sent_s + took_s
        current = health.record(policy, current, success)
        yield sent_s, ended_s, current


def first(state: State, found: Iterator[tuple[float, float, Health]]) -> float:
    return next(ended_s for _, ended_s, current in found if current.state is state)


def test_unhealthy_at_170_s_from_the_start_with_the_defaults() -> None:
    found = list(probes(DEFAULTS, lambda _: (False, 0.0), 300))
    assert [sent_s for sent_s, _, _ in found][:3] == [70, 80, 90]
    assert first(State.UNHEALTHY, iter(found)) == 170
    assert all(current.state is State.DEGRADED for sent_s, _, current in found if sent_s < 170)


def test_unhealthy_110_s_after_the_last_success() -> None:
    found = probes(DEFAULTS, lambda sent_s: (sent_s <= 200, 0.0), 400)
    assert first(State.UNHEALTHY, found) == 200 + 110


def test_unhealthy_becomes_healthy_again() -> None:
    found = list(probes(DEFAULTS, lambda sent_s: (sent_s >= 500, 0.0), 600))
    assert first(State.HEALTHY, iter(found)) == 500
    assert found[-1][2].failures == 0


def test_a_probe_that_outlasts_its_interval_delays_the_next() -> None:
    found = list(probes(DEFAULTS, lambda sent_s: (False, 25.0 if sent_s == 70 else 0.0), 120))
    # Due at 80 and 90, both sent when the first ended at 95; then on the schedule again.
    assert [sent_s for sent_s, _, _ in found] == [70, 95, 95, 100, 110, 120]


def test_probes_during_the_delay_can_succeed_but_not_fail() -> None:
    policy = Policy(10.0, 10, 15.0, 1800.0, probe_during_initial_delay=True)
    found = list(probes(policy, lambda sent_s: (40 <= sent_s < 60, 0.0), 3000))
    assert [sent_s for sent_s, _, _ in found][:4] == [10, 20, 30, 40]
    assert first(State.HEALTHY, iter(found)) == 40
    assert all(current.failures == 0 for sent_s, _, current in found if sent_s <= 1800)
    assert first(State.UNHEALTHY, iter(found)) == 1800 + 110
    sent = [sent_s for sent_s, _, _ in found]
    assert len(sent) == len(set(sent))


def test_early_probes_of_a_delay_that_is_no_multiple() -> None:
    policy = Policy(10.0, 3, 5.0, 25.0, probe_during_initial_delay=True)
    assert [sent_s for sent_s, _, _ in probes(policy, lambda _: (False, 0.0), 60)] == [10, 20, 35, 45, 55]


def test_no_added_latency_without_a_delay() -> None:
    policy = Policy(0.5, 10, 5.0, 0.0)
    assert next(probes(policy, lambda _: (True, 0.0), 10))[0] == 0.5


def test_an_adopted_kernel_keeps_state_count_and_schedule() -> None:
    current = health.resume(DEFAULTS, State.HEALTHY, failures=4, elapsed_s=123.0)
    found = list(probes(DEFAULTS, lambda _: (False, 0.0), 400, current, ended_s=123.0))
    assert found[0][0] == 130
    # Six more failures are borne, the seventh is the eleventh.
    assert first(State.UNHEALTHY, iter(found)) == 190


def test_an_absence_of_the_agent_is_no_failure_of_the_model() -> None:
    current = health.resume(DEFAULTS, State.HEALTHY, failures=0, elapsed_s=3601.0)
    found = list(probes(DEFAULTS, lambda _: (False, 0.0), 4000, current, ended_s=3601.0))
    assert found[0][0] == 3610
    assert first(State.UNHEALTHY, iter(found)) == 3710


def test_adopted_within_the_delay() -> None:
    policy = Policy(10.0, 10, 15.0, 60.0, probe_during_initial_delay=True)
    current = health.resume(policy, State.DEGRADED, 0, elapsed_s=31.0)
    assert health.due_s(policy, current, 31.0) == 40 and current.early
    assert health.due_s(DEFAULTS, health.resume(DEFAULTS, State.DEGRADED, 0, 31.0), 31.0) == 70


def test_without_a_health_check_the_port_decides() -> None:
    found = list(probes(None, lambda sent_s: (3 <= sent_s < 30, 0.0), 60))
    assert found[0][0] == 0
    assert 3 <= first(State.HEALTHY, iter(found)) < 3.2
    assert all(current.failures == 0 for sent_s, _, current in found if sent_s < 3)
    assert 35 < first(State.UNHEALTHY, iter(found)) < 50


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 40)), min_size=1, max_size=60),
    st.integers(1, 5),
    st.sampled_from([0.0, 5.0, 60.0]),
    st.booleans(),
)
def test_the_count_decides(
    answers: list[tuple[bool, float]], max_retries: int, delay_s: float, early: bool
) -> None:
    policy = Policy(10.0, max_retries, 40.0, delay_s, early)
    current, ended_s, failures, state = health.begin(policy), 0.0, 0, State.DEGRADED
    for success, took_s in answers:
        sent_s = health.due_s(policy, current, ended_s)
        assert sent_s >= ended_s
        decisive = sent_s >= delay_s + policy.interval_s and not current.early
        ended_s = sent_s + took_s
        current = health.record(policy, current, success)
        if success:
            failures, state = 0, State.HEALTHY
        elif decisive:
            failures += 1
            state = State.UNHEALTHY if failures > max_retries else state
        assert (current.state, current.failures) == (state, failures)
