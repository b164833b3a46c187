"""Choosing a replica."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dure.appproxy.balance import EJECTION_MAX_S, Balancer, NoReplica, Replica
from dure.appproxy.table import Target, TrafficPool


def _balancer(*targets: Target, most: int = 100) -> Balancer:
    balancer = Balancer(most)
    balancer.update(targets)
    return balancer


def _take(balancer: Balancer, now_s: float = 0, tried: tuple[str, ...] = ()) -> Replica:
    replica = balancer.choose(now_s, tried)
    assert isinstance(replica, Replica)
    balancer.acquire(replica)
    return replica


def test_load_follows_weights() -> None:
    balancer = _balancer(Target("a", "h", 1, weight=3), Target("b", "h", 2, weight=1))
    counts = {"a": 0, "b": 0}
    for _ in range(40):
        counts[_take(balancer).target.replica_uid] += 1
    assert counts == {"a": 30, "b": 10}


def test_ties_go_round() -> None:
    balancer = _balancer(*(Target(uid, "h", 1) for uid in "abc"))
    chosen = []
    for _ in range(6):
        replica = _take(balancer)
        chosen.append(replica.target.replica_uid)
        balancer.release(replica)
    assert chosen == list("abcabc")


def test_tried_draining_and_busy_ones_are_left_out() -> None:
    balancer = _balancer(Target("a", "h", 1), Target("b", "h", 2), Target("c", "h", 3, draining=True), most=1)
    assert _take(balancer, tried=("a",)).target.replica_uid == "b"
    assert balancer.choose(0, ("a",)) is NoReplica.ALL_BUSY
    assert balancer.choose(0, ("a", "b")) is NoReplica.ALL_TRIED
    assert _take(balancer).target.replica_uid == "a"
    assert balancer.choose(0) is NoReplica.ALL_BUSY
    assert balancer.drained() == ["c"]
    assert _balancer(Target("c", "h", 3, draining=True)).choose(0) is NoReplica.NONE_SERVING


def test_ejection_doubles_to_its_bound_and_ends_with_a_trial() -> None:
    balancer = _balancer(Target("a", "h", 1), Target("b", "h", 2))
    bad = _take(balancer, tried=("b",))
    now_s = 0.0
    for duration_s in (1, 2, 4, 8, 10, 10):
        balancer.connect_failed(bad, now_s)
        balancer.connect_failed(bad, now_s)  # of the same moment: counts once
        assert bad.ejected(now_s + duration_s - 0.01)
        assert not bad.ejected(now_s + duration_s)
        now_s += duration_s
    assert duration_s == EJECTION_MAX_S
    balancer.release(bad)
    good = [_take(balancer, now_s - 1) for _ in range(3)]
    assert {r.target.replica_uid for r in good} == {"b"}
    trial = _take(balancer, now_s)
    assert trial is bad
    assert _take(balancer, now_s).target.replica_uid == "b"
    balancer.connected(trial)
    assert _take(balancer, now_s) is bad


def test_the_least_bad_one_serves_when_all_are_ejected() -> None:
    balancer = _balancer(Target("a", "h", 1), Target("b", "h", 2))
    for uid, at_s in (("a", 0.0), ("b", 0.5)):
        replica = _take(balancer, at_s, tried=tuple({"a", "b"} - {uid}))
        balancer.connect_failed(replica, at_s)
        balancer.release(replica)
    assert _take(balancer, 0.6).target.replica_uid == "a"


def test_a_replica_keeps_its_count_and_loses_it_with_its_address() -> None:
    balancer = _balancer(Target("a", "h", 1))
    replica = _take(balancer)
    assert balancer.update([Target("a", "h", 1, draining=True)]) == [replica]
    assert balancer.drained() == []
    balancer.release(replica)
    assert balancer.drained() == ["a"]
    balancer.update([Target("a", "h", 9)])
    assert _take(balancer) is not replica
    with pytest.raises(ValueError, match="more often"):
        balancer.release(replica)


class _Model(RuleBasedStateMachine):
    """Whatever happens: no count is negative or above its bound, and serving means that somebody serves."""

    def __init__(self) -> None:
        super().__init__()
        self.balancer = Balancer(3)
        self.held: list[Replica] = []
        self.now_s = 0.0

    @rule(
        wanted=st.dictionaries(
            st.sampled_from("abcd"), st.tuples(st.integers(1, 3), st.booleans(), st.integers(1, 3))
        ),
        pools=st.dictionaries(st.integers(1, 3), st.integers(0, 100)),
    )
    def update(self, wanted: dict[str, tuple[int, bool, int]], pools: dict[int, int]) -> None:
        self.balancer.update(
            [Target(uid, "h", 1, *more) for uid, more in wanted.items()],
            [TrafficPool(revision, weight) for revision, weight in pools.items()],
        )

    @rule(tried=st.sets(st.sampled_from("abcd")), pool=st.none() | st.integers(0, 3))
    def choose(self, tried: set[str], pool: int | None) -> None:
        choice = self.balancer.choose(self.now_s, tried, pool)
        serving = [r for r in self.balancer.replicas if not r.target.draining]
        untried = [r for r in serving if r.target.replica_uid not in tried]
        if isinstance(choice, Replica):
            assert choice in untried and choice.outstanding < 3
            self.balancer.acquire(choice)
            self.held.append(choice)
        elif choice is NoReplica.NONE_SERVING:
            assert not serving
        elif choice is NoReplica.ALL_TRIED:
            assert serving and not untried
        else:
            assert any(r.outstanding >= 3 for r in untried)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), ends=st.sampled_from(("ok", "failed", "left")))
    def end(self, data: st.DataObject, ends: str) -> None:
        replica = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if ends == "ok":
            self.balancer.connected(replica)
        elif ends == "failed":
            self.balancer.connect_failed(replica, self.now_s)
        self.balancer.release(replica)

    @rule(seconds=st.floats(0.1, 20))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def counts_are_true(self) -> None:
        for replica in self.balancer.replicas:
            assert replica.outstanding == self.held.count(replica) <= 3
            assert replica.ejected_until_s <= self.now_s + EJECTION_MAX_S


TestBalancer = _Model.TestCase
