"""The modes have an order."""

from dure.wire.enforcement import MODES, least, rank


def test_the_order() -> None:
    assert MODES == ("none", "watchdog", "hook", "mps", "mig")
    assert [rank(mode) for mode in MODES] == [0, 1, 2, 3, 4]
    assert rank("magic") == rank("") == rank("none")


def test_the_least_of_several_is_unknown_until_all_are_known() -> None:
    assert least([]) == ""
    assert least(["mps", "hook", "mig"]) == "hook"
    assert least(["mps", "none"]) == "none"
    assert least(["none", "", "mps"]) == ""
