"""Errors keep below what a gRPC trailer can carry; names have one form each."""

import pytest

from dure.wire import names
from dure.wire.errors import InvalidInput, NotFound, Violation, to_status
from dure.wire.names import ENDPOINT_ID, check_id, new_uid, parse


def test_many_violations_fit_a_trailer() -> None:
    error = InvalidInput.of([Violation(f"field{n}", "x" * 200) for n in range(500)])
    assert to_status(error).ByteSize() < 8_000
    assert to_status(NotFound("y" * 100_000)).ByteSize() < 8_000


@pytest.mark.parametrize("name", ["a", "a-b", "a1", "x" * 63])
def test_good_names(name: str) -> None:
    assert check_id(name, ENDPOINT_ID, "f") is None


@pytest.mark.parametrize("name", ["", "A", "1a", "a-", "-a", "a b", "a_b", "x" * 64, "a\n", "é"])
def test_bad_names(name: str) -> None:
    assert check_id(name, ENDPOINT_ID, "f") is not None


def test_names_are_taken_apart() -> None:
    assert parse(names.endpoint("p", "e"), "projects/{}/endpoints/{}") == ("p", "e")
    for wrong in ("projects/p", "projects/p/endpoints/", "projects//endpoints/e", "projects/p/endpoints/e/x"):
        with pytest.raises(InvalidInput, match="does not have the form"):
            parse(wrong, "projects/{}/endpoints/{}")


def test_uids_sort_by_time_and_are_uuid7() -> None:
    early, late = new_uid(1_000, 2**74 - 1), new_uid(1_001, 0)
    assert early < late
    assert early[14] == "7"
