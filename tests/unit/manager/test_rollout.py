"""Rollouts, against the small world of the reconciler's tests."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reconciler_world import World

from dure.manager import rollout
from dure.manager.model import (
    CanaryStep,
    EndpointStatus,
    KernelHealth,
    KernelPhase,
    RolloutPolicy,
    RolloutState,
    Strategy,
)
from dure.manager.replicas import ROLLOUT_GRACE_MS

CANARY = RolloutPolicy(Strategy.CANARY, steps=(CanaryStep(10, 60_000), CanaryStep(50)))
BLUE_GREEN = RolloutPolicy(Strategy.BLUE_GREEN)


def begun(policy: RolloutPolicy, desired: int = 4) -> World:
    """A world that serves by revision 1 and was just given revision 2."""
    world = World(desired=desired)
    world.all_healthy()
    assert world.endpoint.stable == 1
    world.endpoint = replace(world.endpoint, policy=policy)
    world.revise()
    world.run()
    return world


def test_rolling_takes_no_more_than_the_surge_and_misses_no_more_than_allowed() -> None:
    world = begun(RolloutPolicy(max_surge="50%", max_unavailable="0"))
    assert (len(world.of(1)), len(world.of(2))) == (4, 2)
    assert world.plan.status is EndpointStatus.UPDATING
    for _ in range(6):
        world.live()
        assert world.serving() >= 4
    assert (len(world.of(1)), len(world.of(2))) == (0, 4)
    assert (world.endpoint.stable, world.endpoint.rollout) == (2, None)
    assert world.plan.status is EndpointStatus.HEALTHY


def test_without_surge_an_old_one_leaves_first() -> None:
    world = begun(RolloutPolicy(max_surge="0", max_unavailable="25%"))
    assert len(world.of(1)) == 3
    assert len(world.of(2)) == 1
    for _ in range(8):
        world.live()
        assert world.serving() >= 3
    assert len(world.of(2)) == 4


def test_a_revision_that_never_comes_up_is_rolled_back_and_nothing_was_lost() -> None:
    world = begun(RolloutPolicy())
    for _ in range(6):
        world.live(bad=frozenset({2}))
        assert len([r for r in world.of(1) if r.status.value == "HEALTHY"]) == 4
        world.now_ms += 5_000
    assert world.rollbacks == ["its replicas do not come up: exited with 3; last log lines: boom"]
    assert world.endpoint.revision == 1
    assert world.plan.status is EndpointStatus.HEALTHY
    assert not world.of(2)


def test_one_that_is_unhealthy_from_the_start_ends_it_after_a_grace() -> None:
    world = begun(RolloutPolicy(), desired=1)
    (replica,) = world.of(2)
    world.report(replica.uid, KernelHealth.UNHEALTHY)
    world.run()
    world.now_ms += ROLLOUT_GRACE_MS - 1
    world.run()
    assert not world.rollbacks
    world.now_ms += 1
    world.run()
    assert "its replicas do not come up: unhealthy for 20 s" in world.rollbacks[0]
    assert world.endpoint.revision == 1


def test_one_that_is_slow_to_answer_is_given_its_grace() -> None:
    world = begun(RolloutPolicy(), desired=1)
    (replica,) = world.of(2)
    world.report(replica.uid, KernelHealth.UNHEALTHY)
    world.run()
    world.now_ms += ROLLOUT_GRACE_MS // 2
    world.live()
    world.live()
    assert not world.rollbacks
    assert world.endpoint.stable == 2


def test_one_that_comes_nowhere_is_rolled_back_at_the_deadline() -> None:
    world = begun(RolloutPolicy(deadline_ms=30_000))
    world.now_ms += 29_999
    world.run()
    assert not world.rollbacks
    world.now_ms += 1
    world.run()
    assert world.rollbacks == ["no progress for 30 s"]


def test_without_automatic_rollback_it_is_held_where_it_is() -> None:
    world = begun(RolloutPolicy(automatic_rollback=False))
    for _ in range(6):
        world.live(bad=frozenset({2}))
        world.now_ms += 5_000
    assert world.endpoint.revision == 2
    assert world.endpoint.rollout is not None and world.endpoint.rollout.paused
    assert "exited with 3" in world.plan.reason
    assert len(world.of(1)) == 4 and not world.of(2)
    assert not world.endpoint.blocked


def test_a_pause_holds_and_replaces_what_dies_by_its_like() -> None:
    world = begun(RolloutPolicy())
    world.live()
    assert world.endpoint.rollout is not None
    world.endpoint = replace(world.endpoint, rollout=replace(world.endpoint.rollout, paused=True))
    world.live()
    counts = (len(world.of(1)), len(world.of(2)))
    for _ in range(3):
        world.live()
    assert (len(world.of(1)), len(world.of(2))) == counts
    world.crash(world.of(1)[0].uid)
    world.now_ms += 20_000
    world.live()
    world.live()
    assert world.serving() == 4
    assert len(world.of(2)) == counts[1], "no more of the new revision"
    world.endpoint = replace(
        world.endpoint,
        rollout=rollout.resume(world.endpoint.rollout, RolloutPolicy(), world.now_ms, full=False),
    )
    for _ in range(6):
        world.live()
    assert len(world.of(2)) == 4


def test_blue_green_moves_all_requests_at_once() -> None:
    world = begun(BLUE_GREEN)
    assert (len(world.of(1)), len(world.of(2))) == (4, 4)
    assert world.weights() == {1: 100, 2: 0}
    for replica in world.of(2)[:3]:
        world.report(replica.uid, KernelHealth.HEALTHY)
    world.run()
    assert world.weights() == {1: 100, 2: 0}
    world.report(world.of(2)[3].uid, KernelHealth.HEALTHY)
    world.run()
    assert not world.of(1)
    assert len(world.of(2)) == 4
    world.live()
    assert world.endpoint.stable == 2
    assert world.weights() == {}


def test_a_paused_blue_green_keeps_both_sides() -> None:
    policy = replace(BLUE_GREEN, manual_switch=True)
    world = begun(policy, desired=4)
    world.live()
    assert world.endpoint.rollout is not None
    world.endpoint = replace(world.endpoint, rollout=replace(world.endpoint.rollout, paused=True))
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (4, 4)


def test_what_was_stopped_starts_by_its_new_revision_alone() -> None:
    world = World(desired=2)
    world.all_healthy()
    world.endpoint = replace(world.endpoint, desired=0, policy=replace(BLUE_GREEN, manual_switch=True))
    world.live()
    world.live()
    world.revise()
    world.live()
    assert not world.living()
    world.endpoint = replace(world.endpoint, desired=2)
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (0, 2)
    assert world.endpoint.stable == 2


def test_blue_green_can_wait_for_its_switch() -> None:
    policy = replace(BLUE_GREEN, manual_switch=True)
    world = begun(policy, desired=2)
    world.live()
    world.now_ms += 10_000_000
    world.live()
    assert world.endpoint.rollout is not None and rollout.waits(world.endpoint.rollout, policy)
    assert (len(world.of(1)), len(world.of(2))) == (2, 2)
    resumed = rollout.resume(world.endpoint.rollout, policy, world.now_ms, full=False)
    world.endpoint = replace(world.endpoint, rollout=resumed)
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (0, 2)


def test_a_canary_goes_by_its_steps() -> None:
    world = begun(CANARY, desired=10)
    assert (len(world.of(1)), len(world.of(2))) == (10, 1)
    world.live()
    assert world.weights() == {1: 90, 2: 10}
    assert (len(world.of(1)), len(world.of(2))) == (9, 1)
    world.now_ms += 60_000
    for _ in range(8):
        world.live()
    assert world.weights() == {1: 50, 2: 50}
    assert (len(world.of(1)), len(world.of(2))) == (5, 5)
    assert world.endpoint.rollout is not None and rollout.waits(world.endpoint.rollout, CANARY)
    world.now_ms += 10_000_000
    world.live()
    assert len(world.of(2)) == 5, "it waits to be resumed, however long"
    resumed = rollout.resume(world.endpoint.rollout, CANARY, world.now_ms, full=False)
    world.endpoint = replace(world.endpoint, rollout=resumed)
    for _ in range(10):
        world.live()
        assert world.serving() >= 10
    assert (len(world.of(1)), len(world.of(2))) == (0, 10)
    assert world.endpoint.stable == 2


def test_a_canary_of_one_replica_keeps_the_old_one() -> None:
    world = begun(RolloutPolicy(Strategy.CANARY), desired=1)
    world.live()
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (1, 1)
    assert world.weights() == {1: 90, 2: 10}
    world.endpoint = replace(world.endpoint, revision=1)
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (1, 0)
    assert world.weights() == {}


def test_a_canary_that_is_taken_back_gets_no_more_than_it_had() -> None:
    world = begun(CANARY, desired=2)
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (1, 1)
    world.endpoint = replace(world.endpoint, revision=1)
    world.run()
    # Its replica still helps out until the stable revision has its second one again.
    assert world.serving() == 2
    assert world.weights() == {1: 90, 2: 10}
    world.live()
    world.live()
    assert (len(world.of(1)), len(world.of(2))) == (2, 0)
    assert world.weights() == {}


def test_beyond_the_steps_replicas_are_taken_back_alike() -> None:
    assert rollout.pools_back(CANARY, {1: 4, 2: 6}, wanted=1, desired=10) == {}
    assert rollout.pools_back(CANARY, {1: 5, 2: 5}, wanted=1, desired=10) == {1: 50, 2: 50}
    assert rollout.pools_back(CANARY, {1: 8, 2: 2}, wanted=1, desired=10) == {1: 80, 2: 20}
    assert rollout.pools_back(CANARY, {2: 1}, wanted=1, desired=10) == {}
    assert rollout.pools_back(BLUE_GREEN, {1: 1, 2: 1}, wanted=1, desired=10) == {}


def test_an_update_during_a_rollout_begins_anew() -> None:
    world = begun(CANARY, desired=2)
    world.live()
    world.revise()
    for _ in range(3):
        world.live()
    assert not world.of(2)
    assert (len(world.of(1)), len(world.of(3))) == (1, 1)
    assert world.endpoint.rollout is not None and world.endpoint.rollout.revision == 3


def test_the_first_revision_is_replaced_without_ceremony() -> None:
    """What never worked is no revision to go back to."""
    world = World(desired=2)
    for _ in range(8):
        world.live(bad=frozenset({1}))
        world.now_ms += 20_000
    assert world.endpoint.blocked
    world.endpoint = replace(world.endpoint, policy=CANARY)
    world.revise()
    world.live()
    world.live()
    assert world.plan.status is EndpointStatus.HEALTHY
    assert world.endpoint.stable == 2


def test_a_drained_agent_is_left_without_a_gap() -> None:
    world = World(desired=3)
    world.all_healthy()
    agent = world.living()[0].kernels[0].agent_uid
    world.emptying = frozenset({agent})
    for _ in range(8):
        world.live()
        assert world.serving() >= 3
    assert all(kernel.agent_uid != agent for r in world.living() for kernel in r.kernels)
    assert len(world.living()) == 3
    assert not any(replica.status.value == "FAILED" for replica in world.replicas.values())


@pytest.mark.parametrize(
    ("surge", "unavailable", "desired", "amounts"),
    [
        ("1", "0", 10, (1, 0)),
        ("25%", "25%", 10, (3, 2)),
        ("0", "10%", 5, (1, 0)),
        ("100%", "0", 3, (3, 0)),
        ("0", "2", 5, (0, 2)),
        # The last one stays where another may stand beside it, and only there.
        ("1", "1", 1, (1, 0)),
        ("1", "100%", 3, (1, 2)),
        ("0", "1", 1, (0, 1)),
    ],
)
def test_amounts(surge: str, unavailable: str, desired: int, amounts: tuple[int, int]) -> None:
    assert rollout.amounts(RolloutPolicy(max_surge=surge, max_unavailable=unavailable), desired) == amounts


def test_a_stored_policy_and_state_come_back() -> None:
    policy = rollout.load_policy(
        {
            "strategy": "ROLLOUT_STRATEGY_CANARY",
            "max_surge": "25%",
            "progress_deadline": "90s",
            "steps": [{"weight": 5, "hold": "1.500s"}, {"weight": 50}],
            "no_automatic_rollback": True,
        }
    )
    assert policy == RolloutPolicy(
        Strategy.CANARY,
        "25%",
        deadline_ms=90_000,
        steps=(CanaryStep(5, 1_500), CanaryStep(50)),
        automatic_rollback=False,
    )
    assert rollout.load_policy({}) == RolloutPolicy()
    state = RolloutState(3, 17, most_serving=2, step=1, paused=True, reason="x")
    assert rollout.load_state(rollout.store_state(state)) == state
    assert rollout.load_state({}) is None


policies = st.sampled_from(
    [
        RolloutPolicy(),
        RolloutPolicy(max_surge="0", max_unavailable="1"),
        RolloutPolicy(max_surge="50%", max_unavailable="50%"),
        BLUE_GREEN,
        CANARY,
    ]
)
steps = st.sampled_from(
    ["live", "bad", "revise", "pause", "resume", "full", "crash", "tick", "empty", "scale"]
)


@settings(max_examples=150, deadline=None)
@given(policies, st.lists(st.tuples(steps, st.integers(0, 4)), max_size=30))
def test_a_rollout_never_empties_the_route_and_comes_to_an_end(
    policy: RolloutPolicy, moves: list[tuple[str, int]]
) -> None:
    world = begun(policy, desired=3)
    for what, n in moves:
        serving, state = world.serving(), world.endpoint.rollout
        if what == "live":
            world.live()
        elif what == "bad":
            world.live(bad=frozenset({world.endpoint.revision} - {world.endpoint.stable}))
        elif what == "revise":
            world.revise()
        elif what == "pause" and state is not None:
            world.endpoint = replace(world.endpoint, rollout=replace(state, paused=True))
        elif what in ("resume", "full") and state is not None:
            resumed = rollout.resume(state, policy, world.now_ms, full=what == "full")
            world.endpoint = replace(world.endpoint, rollout=resumed)
        elif what == "crash" and world.living():
            chosen = world.living()[n % len(world.living())]
            if chosen.kernels[0].phase not in (KernelPhase.EXITED, KernelPhase.GONE):
                world.crash(chosen.uid)
                serving -= 1
        elif what == "tick":
            world.now_ms += 1_000 * 4**n
        elif what == "empty":
            world.emptying = frozenset({f"a{n}"}) if n < 3 else frozenset()
        elif what == "scale":
            world.endpoint = replace(world.endpoint, desired=1 + n)
        world.run()
        _, unavailable = rollout.amounts(policy, world.endpoint.desired)
        if what != "crash":
            assert world.serving() >= min(serving, world.endpoint.desired - unavailable, 1)
        if world.weights():
            in_route = {replica.revision for replica in world.living() if replica.status.value == "HEALTHY"}
            assert any(world.weights().get(revision) for revision in in_route) or not in_route
    world.emptying = frozenset()
    world.endpoint = replace(world.endpoint, blocked=False, errors=(), failures=0, failed_ms=0)
    for _ in range(60):
        state = world.endpoint.rollout
        if state is not None:
            resumed = rollout.resume(state, policy, world.now_ms, full=True)
            world.endpoint = replace(world.endpoint, rollout=resumed)
        world.live()
        world.now_ms += 61_000
    assert world.endpoint.stable == world.endpoint.revision
    assert len(world.of(world.endpoint.revision)) == world.endpoint.desired == world.serving()
