"""Amounts are exact, or refused with what was expected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.wire.errors import InvalidInput
from dure.wire.quantities import format_slot, human_bytes, parse_duration_s, parse_slot, parse_slots


@pytest.mark.parametrize(
    ("slot", "text", "milli"),
    [
        ("cpu", "1", 1000),
        ("cpu", "0.5", 500),
        ("cpu", ".25", 250),
        ("cuda.shares", "0.5", 500),
        ("cuda.shares", "2.50", 2500),
        ("cuda.device", "2", 2000),
        ("mem", "1024", 1024_000),
        ("mem", "8gb", 8 * 2**33 * 125),
        ("mem", "1G", 2**30 * 1000),
        ("mem", "512m", 2**29 * 1000),
        ("mem", "1.5GiB", 3 * 2**29 * 1000),
    ],
)
def test_amounts(slot: str, text: str, milli: int) -> None:
    assert parse_slot(slot, text) == milli


@pytest.mark.parametrize(
    ("slot", "text", "says"),
    [
        ("cuda.shares", "0.333", "0.33 and 0.34"),
        ("cuda.shares", "0", "more than zero"),
        ("cuda.shares", "-1", "not an amount"),
        ("cuda.shares", "5g", "no unit"),
        ("cuda.device", "0.5", "cuda.shares"),
        ("cpu", "0.0001", "finer than 0.001"),
        ("cpu", "a lot", "not an amount"),
        ("cpu", "1e3", "not an amount"),
        ("cpu", "nan", "not an amount"),
        ("cpu", "99999999", "the most"),
        ("mem", "1.5", "whole number of bytes"),
        ("mem", "1xb", "unknown unit"),
        ("gpu", "1", "known: cpu, mem"),
        ("mem", "", "not an amount"),
    ],
)
def test_what_is_not_exact_is_refused(slot: str, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_slot(slot, text)


def test_all_slots_are_checked_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_slots({"cpu": "x", "mem": "1zb", "cuda.shares": "0.5", "cuda.device": "1"}, "slots")
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"slots[cpu]", "slots[mem]", "slots"}


@given(st.integers(1, 10_000).map(lambda n: n * 10))
def test_shares_survive_a_round_trip(milli: int) -> None:
    assert parse_slot("cuda.shares", format_slot("cuda.shares", milli)) == milli


@given(st.text(max_size=30))
def test_any_text_is_an_amount_or_an_error(text: str) -> None:
    for slot in ("cpu", "mem", "cuda.shares", "cuda.device"):
        try:
            assert parse_slot(slot, text) > 0
        except ValueError as error:
            assert str(error)


def test_durations_and_sizes() -> None:
    assert parse_duration_s("1h30m") == 5400
    assert parse_duration_s("7d") == 604800
    assert parse_duration_s("500ms") == 0.5
    for wrong in ("", "h", "1x", "1h-3m", "-1s"):
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration_s(wrong)
    assert human_bytes(1536 * 2**20) == "1.5 GiB"
