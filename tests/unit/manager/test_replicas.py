"""The reconciler, against a small world that does what the plans say."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from reconciler_world import World

from dure.manager.model import EndpointStatus, KernelHealth, KernelPhase, ReplicaStatus
from dure.manager.plan import backoff_ms
from dure.manager.replicas import (
    DRAIN_GRACE_MS,
    FAILURES_MAX,
    LOST_KEEP_MS,
    PROVEN_MS,
    STABLE_MS,
    UNHEALTHY_GRACE_MS,
)
from dure.manager.serving import in_route

S = ReplicaStatus


def test_main_path() -> None:
    world = World()
    assert world.run().status is EndpointStatus.DEGRADED
    world.all_healthy()
    assert world.plan.status is EndpointStatus.HEALTHY
    assert world.serving() == 2


def test_a_crash_after_serving_is_replaced_at_once() -> None:
    world = World()
    world.all_healthy()
    world.now_ms += STABLE_MS
    world.crash(world.living()[0].uid)
    world.run()
    assert world.made == 3
    assert not world.endpoint.errors


def test_a_crash_loop_backs_off_and_blocks() -> None:
    world = World(desired=1)
    pauses = []
    for _ in range(FAILURES_MAX):
        world.run()
        world.crash(world.living()[0].uid)
        plan = world.run()
        if plan.blocked:
            break
        assert plan.look_again_ms is not None
        pauses.append(plan.look_again_ms - world.now_ms)
        world.now_ms = plan.look_again_ms
    assert pauses == [1000, 2000, 4000, 8000]
    assert world.plan.status is EndpointStatus.BLOCKED
    assert "boom" in world.plan.reason
    assert world.made == FAILURES_MAX
    world.endpoint = replace(world.endpoint, blocked=False, errors=(), failures=0, failed_ms=0, rollout=None)
    world.run()
    assert world.made == FAILURES_MAX + 1


def test_what_dies_together_counts_once_and_what_served_waits_little() -> None:
    world = World(desired=4)
    world.all_healthy()
    world.now_ms += 1_000
    for replica in world.living():
        world.crash(replica.uid, "SIGNALED")
    plan = world.run()
    assert world.endpoint.failures == 1
    assert plan.look_again_ms == world.now_ms + 1_000
    for _ in range(20):
        world.now_ms += 60_000
        world.all_healthy()
        world.now_ms += 1_000
        for replica in world.living():
            world.crash(replica.uid, "SIGNALED")
        plan = world.run()
        assert plan.look_again_ms is not None
        assert plan.look_again_ms - world.now_ms <= 8_000
    assert not world.endpoint.blocked


def test_a_gpu_that_is_lost_does_not_count_and_what_the_replica_did_does() -> None:
    world = World(desired=1)
    for _ in range(FAILURES_MAX + 1):
        world.run()
        world.crash(world.living()[0].uid, "DEVICE_LOST")
        world.run()
        assert (world.endpoint.failures, world.endpoint.errors) == (0, ())
    for reason in ("GPU_MEMORY_EXCEEDED", "IMAGE_FAILED", "ENFORCEMENT_FAILED"):
        world = World(desired=1)
        world.run()
        world.crash(world.living()[0].uid, reason)
        world.run()
        assert world.endpoint.failures == 1
        assert len(world.endpoint.errors) == 1


def _evict(world: World, healthy_ms: int, reason: str = "GPU_MEMORY_EXCEEDED") -> None:
    """A replica starts as soon as one may, is healthy for that long, and its node ends it."""
    plan = world.run()
    if not world.living():
        assert plan.look_again_ms is not None
        world.now_ms = plan.look_again_ms
    world.now_ms += 1_000
    world.all_healthy()
    world.now_ms += healthy_ms
    world.run()
    world.crash(world.living()[0].uid, reason)
    world.run()


@given(st.sampled_from(["GPU_MEMORY_EXCEEDED", "ENFORCEMENT_FAILED"]), st.integers(0, PROVEN_MS - 1))
@settings(max_examples=30)
def test_what_nodes_end_again_and_again_is_blocked_although_it_was_healthy(reason: str, ms: int) -> None:
    world = World(desired=1)
    for count in range(1, FAILURES_MAX):
        _evict(world, ms, reason)
        assert (world.endpoint.blocked, world.endpoint.evictions) == (False, count)
        assert world.plan.look_again_ms == world.now_ms + backoff_ms(count)
        assert "the next start is in" in world.plan.reason
        assert "exited with 3; last log lines: boom" in world.plan.reason
    _evict(world, ms, reason)
    assert world.plan.status is EndpointStatus.BLOCKED
    assert "5 replicas in a row failed or were ended by their nodes; last error: replica" in world.plan.reason


@given(st.integers(PROVEN_MS, PROVEN_MS * 100))
@settings(max_examples=30)
def test_a_replica_that_stayed_for_long_ends_a_series_of_evictions(ms: int) -> None:
    world = World(desired=1)
    for _ in range(FAILURES_MAX - 1):
        _evict(world, 30_000)
    assert len(world.endpoint.errors) == FAILURES_MAX - 1
    _evict(world, ms)
    assert (world.endpoint.evictions, world.endpoint.errors, world.endpoint.blocked) == (0, (), False)


def test_who_waits_for_the_next_start_tells_the_last_error() -> None:
    world = World(desired=1)
    world.all_healthy()
    world.crash(world.living()[0].uid, "OOM")
    world.run()
    assert world.plan.status is EndpointStatus.UNHEALTHY
    assert world.plan.reason.startswith("the next start is in 1 s; last error: replica r0001 on a1: exited")
    world.now_ms += 1_000
    world.run()
    assert world.plan.status is EndpointStatus.DEGRADED
    assert world.plan.reason.startswith("0 of 1 healthy, 1 starting; last error: replica r0001")
    world.all_healthy()
    world.now_ms += STABLE_MS
    world.run()
    assert (world.plan.status, world.plan.reason) == (EndpointStatus.HEALTHY, "")


def test_one_wave_of_failures_does_not_block() -> None:
    world = World(desired=8)
    for wave in range(FAILURES_MAX):
        assert not world.endpoint.blocked, wave
        world.run()
        for replica in world.living():
            world.crash(replica.uid)
        plan = world.run()
        world.now_ms = plan.look_again_ms or world.now_ms
    assert world.endpoint.blocked


def test_a_healthy_neighbour_does_not_hide_a_crash_loop() -> None:
    world = World(desired=1)
    world.all_healthy()
    world.now_ms += STABLE_MS * 2
    world.endpoint = replace(world.endpoint, desired=2)
    for _ in range(FAILURES_MAX):
        world.run()
        starting = [replica for replica in world.living() if not in_route(replica)]
        if not starting:
            world.now_ms += backoff_ms(world.endpoint.failures)
            world.run()
            starting = [replica for replica in world.living() if not in_route(replica)]
        world.crash(starting[0].uid)
        world.run()
    assert world.endpoint.blocked
    assert world.serving() == 1


def test_killing_replicas_that_serve_never_blocks() -> None:
    world = World(desired=2)
    for _ in range(FAILURES_MAX * 3):
        world.all_healthy()
        world.crash(world.living()[0].uid, "SIGNALED")
        world.run()
        world.now_ms += 70_000
    assert not world.endpoint.blocked


def test_scale_in_stops_what_serves_least_and_drains_the_rest() -> None:
    world = World(desired=3)
    world.run()
    first, second, third = (replica.uid for replica in world.living())
    world.report(first, KernelHealth.HEALTHY)
    world.report(third, KernelHealth.HEALTHY)
    world.run()
    world.endpoint = replace(world.endpoint, desired=2)
    world.run()
    assert world.replicas[second].status is S.TERMINATING
    assert not world.replicas[second].kernels[0].wanted, "it did not serve: nothing to drain"
    world.endpoint = replace(world.endpoint, desired=1)
    plan = world.run()
    assert world.replicas[third].draining
    assert world.replicas[third].kernels[0].wanted
    assert plan.look_again_ms is not None
    world.drained = frozenset({third})
    world.run()
    assert not world.replicas[third].kernels[0].wanted
    world.stop_what_is_unwanted()
    world.run()
    assert world.replicas[third].status is S.TERMINATED
    assert in_route(world.replicas[first])


def test_a_drain_ends_by_the_clock_without_proxies() -> None:
    world = World(desired=1)
    world.all_healthy()
    world.endpoint = replace(world.endpoint, desired=0)
    world.run()
    world.now_ms += DRAIN_GRACE_MS
    world.run()
    assert not world.living()[0].kernels[0].wanted
    assert world.plan.status is EndpointStatus.STOPPED


def test_unhealthy_leaves_the_route_comes_back_or_is_replaced() -> None:
    world = World(desired=1)
    world.all_healthy()
    uid = world.living()[0].uid
    world.report(uid, KernelHealth.UNHEALTHY)
    assert world.run().status is EndpointStatus.UNHEALTHY
    assert world.serving() == 0
    world.report(uid, KernelHealth.HEALTHY)
    assert world.run().status is EndpointStatus.HEALTHY
    world.report(uid, KernelHealth.UNHEALTHY)
    world.run()
    world.now_ms += UNHEALTHY_GRACE_MS
    world.run()
    assert world.replicas[uid].status is S.FAILED


def test_a_lost_agent_keeps_its_traffic_until_replacements_serve() -> None:
    world = World(desired=2)
    world.all_healthy()
    lost = world.living()[0]
    agent = lost.kernels[0].agent_uid
    world.lost_ms = {agent: 20_000}
    world.run()
    assert world.made == 2, "lost, but not given up on"
    world.given_up = frozenset({agent})
    world.run()
    assert world.made == 3
    assert in_route(world.replicas[lost.uid])
    assert world.serving() == 2
    newest = world.living()[-1]
    world.report(newest.uid, KernelHealth.HEALTHY)
    world.run()
    assert world.replicas[lost.uid].status is S.FAILED
    assert world.serving() == 2
    assert world.plan.status is EndpointStatus.HEALTHY


def test_an_agent_that_is_back_keeps_its_replicas() -> None:
    world = World(desired=2)
    world.all_healthy()
    before = {replica.uid for replica in world.living()}
    agent = world.living()[0].kernels[0].agent_uid
    world.given_up, world.lost_ms = frozenset({agent}), {agent: 25_000}
    world.run()
    world.given_up, world.lost_ms = frozenset(), {}
    world.run()
    assert {replica.uid for replica in world.living() if not replica.leaving} == before


def test_without_a_replacement_a_lost_replica_leaves_in_the_end() -> None:
    world = World(desired=1)
    world.all_healthy()
    uid = world.living()[0].uid
    agent = world.living()[0].kernels[0].agent_uid
    world.given_up, world.lost_ms = frozenset({agent}), {agent: LOST_KEEP_MS}
    world.run()
    assert world.replicas[uid].status is S.FAILED
    assert not world.endpoint.errors


def test_a_new_revision_replaces_without_a_gap() -> None:
    world = World(desired=3)
    world.all_healthy()
    world.revise()
    for _ in range(12):
        world.run()
        assert world.serving() >= 3
        staying = [replica for replica in world.living() if not replica.leaving]
        assert len(staying) <= 4
        for replica in staying:
            world.report(replica.uid, KernelHealth.HEALTHY)
        world.drained = frozenset(replica.uid for replica in world.living() if replica.draining)
        world.run()
        world.stop_what_is_unwanted()
    assert {replica.revision for replica in world.living()} == {2}
    assert len(world.living()) == 3


def test_deletion_waits_for_everything() -> None:
    world = World()
    world.all_healthy()
    world.endpoint = replace(world.endpoint, deleting=True)
    assert not world.run().gone
    world.drained = frozenset(world.replicas)
    world.run()
    world.stop_what_is_unwanted()
    assert world.run().gone


step = st.sampled_from(
    ["healthy", "unhealthy", "crash", "gone", "scale", "lose", "back", "tick", "drained", "revise"]
)


@settings(max_examples=150)
@given(st.lists(st.tuples(step, st.integers(0, 5)), max_size=40))
def test_whatever_happens_it_settles_and_converges(steps: list) -> None:
    world = World()
    world.run()
    for what, n in steps:
        living = world.living()
        chosen = living[n % len(living)] if living else None
        ran = chosen is not None and chosen.kernels[0].phase not in (KernelPhase.EXITED, KernelPhase.GONE)
        if what == "healthy" and ran:
            world.report(chosen.uid, KernelHealth.HEALTHY)
        elif what == "unhealthy" and ran:
            world.report(chosen.uid, KernelHealth.UNHEALTHY)
        elif what == "crash" and ran:
            world.crash(chosen.uid)
        elif what == "gone":
            world.stop_what_is_unwanted()
        elif what == "scale":
            world.endpoint = replace(world.endpoint, desired=n)
        elif what == "lose":
            world.given_up, world.lost_ms = frozenset({f"a{n % 3}"}), {f"a{n % 3}": 30_000}
        elif what == "back":
            world.given_up, world.lost_ms = frozenset(), {}
        elif what == "tick":
            world.now_ms += 10_000 * n
        elif what == "drained":
            world.drained = frozenset(replica.uid for replica in living if replica.draining)
        elif what == "revise":
            world.revise()
        world.run()
        staying = [replica for replica in world.living() if not replica.leaving]
        assert (
            len(staying) <= 2 * world.endpoint.desired + 1 + len(world.given_up) * world.endpoint.desired + 6
        )
    # Left in peace, it gets where it was wanted.
    world.given_up, world.lost_ms = frozenset(), {}
    world.endpoint = replace(world.endpoint, blocked=False, errors=(), failures=0, failed_ms=0, rollout=None)
    for _ in range(40):
        world.now_ms += 61_000
        for replica in world.living():
            if not replica.leaving and replica.kernels[0].phase not in (KernelPhase.EXITED, KernelPhase.GONE):
                world.report(replica.uid, KernelHealth.HEALTHY)
        world.run()
        world.stop_what_is_unwanted()
    assert len(world.living()) == world.endpoint.desired
    assert world.serving() == world.endpoint.desired
    assert {replica.revision for replica in world.living()} <= {world.endpoint.revision}
