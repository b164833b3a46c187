"""Quotas: what counts, and what goes over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dure.manager import usage
from dure.manager.usage import Wanted

SLOTS = st.dictionaries(st.sampled_from(["cpu", "mem", "cuda.shares"]), st.integers(1, 10_000), max_size=3)
WANTED = st.builds(Wanted, st.integers(0, 20), st.integers(1, 4), SLOTS)


def test_replicas_times_kernels_times_slots() -> None:
    wanted = [Wanted(3, 2, {"cpu": 500}), Wanted(1, 1, {"cpu": 1_000, "mem": 7}), Wanted(0, 1, {"mem": 9})]
    assert usage.total(wanted) == {"cpu": 4_000, "mem": 7}


def test_the_sentence_has_all_numbers() -> None:
    others = [Wanted(2, 1, {"cuda.shares": 1_000, "cpu": 1_000})]
    after = Wanted(2, 2, {"cuda.shares": 500, "cpu": 1_000})
    assert usage.exceeded({"cuda.shares": 3_500}, others, None, after) == [
        "cuda.shares: the quota is 3.50, other endpoints use 2.00, and this one wants 2.00 "
        "(2 replicas x 2 kernels x 0.50)"
    ]
    assert usage.exceeded({"cuda.shares": 4_000}, others, None, after) == []
    assert len(usage.exceeded({"cuda.shares": 0, "cpu": 0}, others, None, after)) == 2


def test_who_is_over_may_shrink_but_not_grow() -> None:
    others = [Wanted(4, 1, {"cpu": 1_000})]
    quota = {"cpu": 1_000}
    before = Wanted(4, 1, {"cpu": 1_000})
    assert usage.exceeded(quota, others, before, Wanted(3, 1, {"cpu": 1_000})) == []
    assert usage.exceeded(quota, others, before, before) == []
    assert usage.exceeded(quota, others, before, Wanted(5, 1, {"cpu": 1_000}))


@given(quota=SLOTS, others=st.lists(WANTED, max_size=4), before=st.none() | WANTED, after=WANTED)
def test_what_passes_fits_or_does_not_grow(
    quota: dict[str, int], others: list[Wanted], before: Wanted | None, after: Wanted
) -> None:
    told = usage.exceeded(quota, others, before, after)
    held = before.total() if before is not None else {}
    sums = usage.total([*others, after])
    over = {
        slot
        for slot, limit in quota.items()
        if sums.get(slot, 0) > limit and after.total().get(slot, 0) > held.get(slot, 0)
    }
    assert {sentence.partition(":")[0] for sentence in told} == over
