"""The page of `dure top`: who stands on it when there is no room for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dure.client.cli.text import figure, milliseconds
from dure.client.cli.top import View, lines, ranked
from dure.v1.agent_pb2 import Agent
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.scaling_pb2 import EndpointMeasurements, GetMeasurementsResponse


def view(endpoints: int, nodes: int) -> View:
    names = [f"projects/p/endpoints/e{number:03}" for number in range(endpoints)]
    measured = [EndpointMeasurements(endpoint=name, requests_per_second=i) for i, name in enumerate(names)]
    return (
        [Endpoint(name=name) for name in names],
        [Agent(name=f"agents/n{number:03}") for number in range(nodes)],
        GetMeasurementsResponse(endpoints=measured),
    )


@given(st.integers(0, 50), st.integers(0, 50), st.integers(10, 60))
def test_the_page_fits_and_says_what_is_left_out(endpoints: int, nodes: int, rows_max: int) -> None:
    page = lines(view(endpoints, nodes), color=False, rows_max=rows_max)
    assert len(page) <= rows_max
    for letter, count, word in (("e", endpoints, "endpoints"), ("n", nodes, "nodes")):
        shown = sum(line[:1] == letter and line[1:4].isdigit() for line in page)
        left = next((int(line.split()[1]) for line in page if line.endswith(f"more {word}")), 0)
        assert shown + left == count and (shown or not count)


def test_the_busiest_first_and_those_that_nobody_measures_by_name() -> None:
    items, _, answer = view(4, 0)
    seen = {one.endpoint: one for one in answer.endpoints if not one.endpoint.endswith("2")}
    assert [item.name[-1] for item in ranked(items, seen)] == ["3", "1", "0", "2"]


def test_figures() -> None:
    assert [figure(value) for value in (0, 0.254, 1, 9.99, 12.34, 12.0, 99.96, 123.4, 12345)] == [
        *("0", "0.25", "1", "9.99", "12.3", "12", "100", "123", "12,345")
    ]
    assert [milliseconds(value) for value in (0, 0.4, 35, 999.4, 1234, 61_000)] == [
        *("", "0.4ms", "35ms", "999ms", "1.23s", "61s")
    ]
