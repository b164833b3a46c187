"""Shares of traffic: rounds, and pools of replicas."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, rule

from dure.appproxy.balance import Balancer, NoReplica, Replica
from dure.appproxy.rounds import ROUNDS_MAX, Round, Rounds
from dure.appproxy.table import Target, TrafficPool

Pools = dict[int, int]


def _targets(counts: Pools, *, draining: Sequence[str] = ()) -> list[Target]:
    """So many replicas of each revision: `1a`, `1b`, `2a`."""
    uids = [f"{revision}{'abcdef'[i]}" for revision, count in counts.items() for i in range(count)]
    return [Target(uid, "h", 1, 1, uid in draining, int(uid[0])) for uid in uids]


def _balancer(counts: Pools, weights: Pools, most: int = 100) -> Balancer:
    balancer = Balancer(most)
    balancer.update(_targets(counts), _pools(weights))
    return balancer


def _pools(weights: Pools) -> list[TrafficPool]:
    return [TrafficPool(revision, weight) for revision, weight in weights.items()]


def _ask(balancer: Balancer, tried: Sequence[str] = (), pool: int | None = None, now_s: float = 0) -> str:
    """The uid of the replica that takes a request and is done with it at once."""
    replica = balancer.choose(now_s, tried, pool)
    assert isinstance(replica, Replica)
    balancer.acquire(replica)
    balancer.release(replica)
    return replica.target.replica_uid


def _shares(balancer: Balancer, requests: int) -> Counter[str]:
    """Requests by pool."""
    return Counter(_ask(balancer)[0] for _ in range(requests))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_a_round_gives_each_its_weight_in_any_window(weights: list[int]) -> None:
    turns = Round(dict(enumerate(weights)))
    total = sum(weights)
    window: deque[int] = deque(maxlen=total)
    for number in range(3 * total):
        window.append(turns.next())
        if number >= total - 1:
            assert [window.count(party) for party in range(len(weights))] == weights


def test_a_small_weight_is_spread_evenly() -> None:
    turns = Round({1: 98, 2: 2})
    at = [number for number in range(1000) if turns.next() == 2]
    assert {later - earlier for earlier, later in itertools.pairwise(at)} == {50}


@given(
    st.tuples(st.integers(1, 99), st.integers(1, 99)), st.lists(st.integers(1, 60), min_size=1, max_size=20)
)
def test_other_weights_take_effect_at_once_and_owe_nothing(
    shares: tuple[int, int], lengths: list[int]
) -> None:
    """Weights that change again and again: the sum of what is due is what was given, within one."""
    rounds = Rounds({1: 100 - shares[0], 2: shares[0]})
    due = given_to = 0.0
    for share, length in zip(itertools.cycle(shares), lengths, strict=False):
        rounds.reweigh({1: 100 - share, 2: share})
        for _ in range(length):
            due += share / 100
            given_to += rounds.next((1, 2)) == 2
            assert abs(due - given_to) <= 1


def test_rounds_of_all_sets_are_bounded() -> None:
    rounds = Rounds(dict.fromkeys(range(10), 10))
    for count in range(2, 5):
        for able in itertools.combinations(range(10), count):
            assert rounds.next(able) in able
    assert len(rounds._rounds) == ROUNDS_MAX


class _Shares(RuleBasedStateMachine):
    """Targets come, go, drain, fail and recover. For each set of pools that could take a request, the
    requests that found just these are shared within one by weight, and exactly at the end of each cycle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = {1: 90, 2: 9, 3: 1}
        self.balancer = Balancer(1000)
        self.counts = {1: 1, 2: 1, 3: 1}
        self.failed: set[str] = set()
        self.now_s = 0.0
        self.taken: dict[frozenset[int], Counter[int]] = {}
        self._apply()

    def _apply(self) -> None:
        self.balancer.update(_targets(self.counts), _pools(self.weights))

    @rule(counts=st.fixed_dictionaries({1: st.integers(0, 3), 2: st.integers(0, 3), 3: st.integers(0, 3)}))
    def update(self, counts: dict[int, int]) -> None:
        self.counts = counts
        self._apply()

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        serving = list(self.balancer.replicas)
        if serving:
            self.balancer.connect_failed(data.draw(st.sampled_from(serving)), self.now_s)

    @rule()
    def recover(self) -> None:
        for replica in self.balancer.replicas:
            self.balancer.connected(replica)

    @rule(seconds=st.floats(0.1, 20))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(requests=st.sampled_from((1, 7, 100)))
    def ask(self, requests: int) -> None:
        for _ in range(requests):
            able = frozenset(r.target.revision for r in self.balancer.replicas if not r.ejected(self.now_s))
            if not able:
                return
            pool = int(_ask(self.balancer, now_s=self.now_s)[0])
            assert pool in able
            counts = self.taken.setdefault(able, Counter())
            counts[pool] += 1
            total = sum(self.weights[party] for party in able)
            for party in able:
                due = counts.total() * self.weights[party] / total
                assert abs(counts[party] - due) <= (1 if counts.total() % total else 0)


TestShares = _Shares.TestCase
TestShares.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("weights", [{1: 90, 2: 10}, {1: 50, 2: 50}, {1: 1, 2: 99}, {1: 70, 2: 20, 3: 10}])
def test_shares_do_not_follow_the_number_of_replicas(weights: Pools) -> None:
    balancer = _balancer({1: 1, 2: 4, 3: 2}, weights)
    for _ in range(3):
        assert _shares(balancer, 100) == {str(revision): weight for revision, weight in weights.items()}


def test_within_a_pool_all_get_as_much() -> None:
    balancer = _balancer({1: 2, 2: 2}, {1: 50, 2: 50})
    assert Counter(_ask(balancer) for _ in range(100)) == dict.fromkeys(("1a", "1b", "2a", "2b"), 25)


def test_updates_of_targets_let_a_small_weight_have_its_turn() -> None:
    balancer = _balancer({1: 3, 2: 1}, {1: 99, 2: 1})
    counts: Counter[str] = Counter()
    for number in range(1000):
        balancer.update(_targets({1: 1 + number % 4, 2: 1 + number % 2}), _pools({1: 99, 2: 1}))
        counts += _shares(balancer, 1)
    assert counts == {"1": 990, "2": 10}


def test_a_pool_without_a_usable_target_passes_its_turn_on_and_makes_up_nothing() -> None:
    balancer = _balancer({1: 1, 2: 1, 3: 1}, {1: 60, 2: 30, 3: 10})
    _shares(balancer, 50)
    balancer.update(_targets({1: 1, 2: 1, 3: 1}, draining=["1a"]), _pools({1: 60, 2: 30, 3: 10}))
    assert _shares(balancer, 40) == {"2": 30, "3": 10}
    balancer.update(_targets({1: 1, 2: 1, 3: 1}), _pools({1: 60, 2: 30, 3: 10}))
    assert _shares(balancer, 100) == {"1": 60, "2": 30, "3": 10}


def test_a_full_pool_passes_its_turn_on() -> None:
    balancer = _balancer({1: 1, 2: 1}, {1: 90, 2: 10}, most=1)
    held = balancer.choose(0)
    assert isinstance(held, Replica) and held.target.replica_uid == "1a"
    balancer.acquire(held)
    assert _shares(balancer, 10) == {"2": 10}
    second = balancer.choose(0)
    assert isinstance(second, Replica)
    balancer.acquire(second)
    assert balancer.choose(0) is NoReplica.ALL_BUSY


def test_the_reserve_gets_what_nobody_else_could() -> None:
    balancer = _balancer({1: 1, 2: 1}, {1: 100, 2: 0}, most=1)
    assert _shares(balancer, 100) == {"1": 100}
    assert _ask(balancer, tried=["1a"], pool=1) == "2a"
    first = balancer.choose(0)
    assert isinstance(first, Replica)
    balancer.acquire(first)
    # A pool of weight is worth waiting for.
    assert balancer.choose(0) is NoReplica.ALL_BUSY
    balancer.connect_failed(first, 0)
    balancer.release(first)
    assert _ask(balancer) == "2a"
    balancer.update(_targets({1: 1, 2: 1}, draining=["1a"]), _pools({1: 100, 2: 0}))
    assert _ask(balancer) == "2a"
    assert balancer.choose(0, ["2a"]) is NoReplica.ALL_TRIED


def test_replicas_of_no_pool_and_pools_of_no_weight_serve_rather_than_nobody() -> None:
    assert _shares(_balancer({4: 2}, {1: 100}), 10) == {"4": 10}
    assert _shares(_balancer({1: 1, 2: 1}, {1: 0, 2: 0}), 10) == {"1": 5, "2": 5}
    whole = _balancer({1: 1, 2: 3}, {})  # without pools, revisions mean nothing
    assert Counter(_ask(whole) for _ in range(8)) == dict.fromkeys(("1a", "2a", "2b", "2c"), 2)


def test_all_ejected_those_of_weight_are_tried_first() -> None:
    balancer = _balancer({1: 2, 2: 1}, {1: 100, 2: 0})
    for at_s, replica in enumerate(balancer.replicas):
        balancer.connect_failed(replica, at_s / 10)
    assert _ask(balancer, now_s=0.5) == "1a"
    assert _ask(balancer, ["1a"], 1, 0.5) == "1b"
    assert _ask(balancer, ["1a", "1b"], 1, 0.5) == "2a"
    assert balancer.choose(0.5, ["1a", "1b", "2a"], 1) is NoReplica.ALL_TRIED


def test_a_retry_stays_in_its_pool_and_costs_nobody_a_turn() -> None:
    balancer = _balancer({1: 2, 2: 2}, {1: 50, 2: 50})
    first: Counter[str] = Counter()
    for _ in range(100):
        uid = _ask(balancer)
        first[uid[0]] += 1
        other = _ask(balancer, [uid], int(uid[0]))
        assert other[0] == uid[0] and other != uid
        assert _ask(balancer, [uid, other], int(uid[0]))[0] != uid[0]
    assert first == {"1": 50, "2": 50}


def test_new_weights_of_the_same_pools_keep_what_was_saved_up() -> None:
    weights = {1: 98, 2: 2}
    balancer = _balancer({1: 1, 2: 1}, weights)
    _shares(balancer, 24)  # the next turn of 2 is after 50 requests, or 25 at 4 in a hundred
    balancer.update(_targets({1: 1, 2: 1}), _pools({1: 96, 2: 4}))
    assert "2" in _shares(balancer, 15)
