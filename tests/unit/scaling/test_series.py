"""Windows, rates and quantiles."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.scaling.series import Buckets, Series, between, rate

INF = math.inf


def test_a_window_is_averaged_and_the_newest_is_told_with_its_age() -> None:
    series = Series(keep_ms=10_000)
    for at_ms, value in ((1_000, 1.0), (2_000, 3.0), (3_000, 8.0)):
        series.add(at_ms, value)
    assert series.over(3_500, 0) == (8.0, 500)
    assert series.over(3_500, 2_000) == (5.5, 500)
    assert series.over(3_500, 10_000) == (4.0, 500)
    series.add(20_000, 1.0)
    assert len(series.values) == 1
    assert Series().over(0, 0) is None


def test_no_number_is_never_averaged() -> None:
    series = Series()
    for value in (math.nan, INF, -INF):
        series.add(1, value)
    assert series.over(1, 0) is None


def test_rates_of_counters_and_their_resets() -> None:
    assert rate((0, 10.0), (2_000, 30.0)) == 10.0
    assert rate(None, (2_000, 30.0)) is None
    assert rate((0, 30.0), (2_000, 10.0)) is None
    assert rate((2_000, 10.0), (2_000, 30.0)) is None


def test_histograms_between_two_looks() -> None:
    bounds = [0.1, 1.0, INF]
    first, second = (bounds, [5.0, 5.0, 5.0]), (bounds, [5.0, 15.0, 15.0])
    found = between(first, second)
    assert found == Buckets((0.1, 1.0), (0.0, 10.0, 0.0))
    assert found is not None and found.quantile(0.5) == pytest.approx(0.55)
    assert between(None, second) is None
    assert between(second, first) is None
    assert between(([0.1, INF], [1.0, 1.0]), second) is None
    assert between((bounds, [0.0, 0.0, 0.0]), (bounds, [5.0, 3.0, 9.0])) is None, "not cumulative"


def test_quantiles() -> None:
    buckets = Buckets((10.0, 20.0), (5.0, 5.0, 0.0))
    assert buckets.quantile(0.5) == 10.0
    assert buckets.quantile(0.75) == 15.0
    assert Buckets((10.0,), (0.0, 0.0)).quantile(0.5) is None
    assert Buckets((10.0,), (0.0, 4.0)).quantile(0.5) == 10.0
    assert buckets.plus(buckets).counts == (10.0, 10.0, 0.0)


@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=4), st.floats(0.01, 1))
def test_a_quantile_lies_within_the_bounds(counts: list[float], share: float) -> None:
    value = Buckets((1.0, 2.0, 5.0), tuple(counts)).quantile(share)
    assert value is None or 0.0 <= value <= 5.0
