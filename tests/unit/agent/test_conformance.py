"""The suite's own books: its rules stand in the protocol, and checks that must be alone are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dure.agent.conformance import report, specs
from dure.agent.conformance.check import Check, batches
from dure.agent.conformance.checks import CHECKS
from dure.agent.conformance.outcome import Outcome, Result
from dure.agent.conformance.program import filled
from dure.client.cli.main import load_program
from dure.fleet.v1 import fleet_pb2

PROTOCOL = (Path(__file__).parents[3] / "docs" / "agent-protocol.md").read_text()


async def _nothing(stage: object) -> None:
    """Nothing."""


def test_every_check_names_a_rule_that_is_there() -> None:
    rules = re.findall(r"^- \*\*(\d+\.\d+)\*\*", PROTOCOL, re.MULTILINE)
    assert rules == sorted(set(rules), key=lambda rule: [int(part) for part in rule.split(".")])
    assert {check.rule for check in CHECKS} <= set(rules)
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(check.says.endswith(".") for check in CHECKS)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_batches_keep_the_order_and_let_alone_who_must_be(alone: list[bool], most: int) -> None:
    checks = [Check(f"c{number}", "1.1", "", one, _nothing) for number, one in enumerate(alone)]
    found = batches(checks, most)
    assert [check for batch in found for check in batch] == checks
    for batch in found:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or not any(check.alone for check in batch)


@given(st.lists(st.sampled_from(Outcome)))
def test_all_results_are_counted(ends: list[Outcome]) -> None:
    results = [Result(f"c{n}", "1.1", end, 0.1, "this", "that", "") for n, end in enumerate(ends)]
    document = report.document(None, results)
    assert document["passed"] + document["failed"] + document["not_applicable"] == len(ends)
    assert [check["outcome"] for check in document["checks"]] == [end.name.lower() for end in ends]
    assert report.summary(results).startswith(f"{ends.count(Outcome.PASSED)} passed, ")
    for result in results:
        assert ("expected this" in report.line(result, 10)) == (result.outcome is Outcome.FAILED)


def test_arguments_of_a_program() -> None:
    values = {"manager": "127.0.0.1:1", "name": "n"}
    assert filled(["--to={manager}", "{name}-{name}", "{other}", "{}"], values) == [
        *("--to=127.0.0.1:1", "n-n", "{other}", "{}")
    ]


def test_a_part_that_is_not_installed_is_told() -> None:
    with pytest.raises(click.ClickException, match="`dure agent nothing` is not installed here"):
        load_program("agent-nothing")


def test_a_session_of_kernels_makes_sense() -> None:
    kernels = [specs.kernel(f"k{n}", f"s{n}", "f", "", "true") for n in range(3)]
    specs.session(kernels, "10.0.0.1", 29500)
    assert {one.session_uid for one in kernels} == {"s0"}
    assert [(one.cluster.role, one.cluster.index) for one in kernels] == [("main", 1), ("sub", 1), ("sub", 2)]
    assert all(len(one.cluster.hosts) == len(one.cluster.addresses) == 3 for one in kernels)
    # Of what was given nothing is left of the default.
    other = specs.kernel("k", "s", "f", "", slots={"mem": 5}, model=fleet_pb2.Mount(folder="x"))
    assert dict(other.slots) == {"mem": 5} and other.model.target == ""
