"""Reading a log again shows no line twice and leaves none out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dure.wire.seen import LinesSeen


@given(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5),
)
def test_every_line_once(steps: list[int], readings: list[tuple[int, int]]) -> None:
    times, now = [], 0
    for step in steps:
        now += step
        times.append(now)
    seen, shown = LinesSeen(), []
    reached = 0
    for start, end in [*readings, (0, len(times))]:
        # Each reading may begin anywhere, but not after what was shown.
        seen.begin_again()
        start = 0 if start > reached else min(start, _first_of_its_time(times, reached))
        shown += [index for index in range(start, min(end, len(times))) if seen.is_new(times[index])]
        reached = max(reached, min(end, len(times)))
    assert shown == list(range(len(times)))


def _first_of_its_time(times: list[int], reached: int) -> int:
    """Lines of one time are told apart by their number: they must be read from the first on."""
    return times.index(times[reached - 1]) if reached else 0
