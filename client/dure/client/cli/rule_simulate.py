"""`dure rule simulate`: what rules would have done over a series, without a manager."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from dure.client.cli.options import Shell, command
from dure.client.cli.output import dumps
from dure.client.cli.plot import plot
from dure.client.cli.rule import rule
from dure.client.cli.tables import Table
from dure.client.cli.text import clean
from dure.client.simulation import Key, Outcome, Scenario, simulate
from dure.client.simulation_file import FILE_BYTES_MAX, read_scenario
from dure.definitions.problems import Problem, decode, invalid
from dure.v1.scaling_pb2 import ScalingRule

WIDTH_MAX = 100
PLOTS_MAX = 6


@command(rule, "simulate", output=True, formats=("table", "json", "yaml"))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False))
@click.option("--rules-of", metavar="ENDPOINT", help="Rules of a living endpoint instead of the file's.")
@click.option("--no-plot", is_flag=True, help="Only the decisions.")
async def simulate_(shell: Shell, file: Path, rules_of: str | None, no_plot: bool) -> None:
    """Replay metrics against rules: every decision, and how replicas and metrics go.

    FILE (YAML; `-` is stdin) holds `rules`, as under `scaling` of `dure apply`, and `series`, or was written
    by `dure rule record`. Once a second of its own clock the rules decide, just as in the manager.
    """
    rules: list[ScalingRule] | None = None
    if rules_of is not None:
        async with shell.client() as client:
            rules = [item async for item in client.rules.list(rules_of)]
    scenario = _read(file, rules)
    outcome = simulate(scenario)
    if shell.output in ("json", "yaml"):
        click.echo(dumps(values(scenario, outcome), shell.output))
        return
    for line in _decisions(outcome).lines(color=shell.color) if outcome.decisions else ():
        click.echo(line)
    click.echo(summary(scenario, outcome))
    for verdict in outcome.newest.verdicts:
        click.echo(f"  {verdict.rule}: {clean(verdict.reason)}")
    # Its blocks cannot be written in every encoding.
    blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    if blocks and not no_plot and not shell.quiet:
        width = min(shutil.get_terminal_size().columns, WIDTH_MAX)
        for line in drawing(scenario, outcome, width):
            click.echo(line)


def summary(scenario: Scenario, outcome: Outcome) -> str:
    """One sentence."""
    desired = [moment.desired for moment in outcome.moments]
    count = len(outcome.decisions)
    return (
        f"{count} decision{'' if count == 1 else 's'} in {scenario.seconds} s: from {scenario.replicas} to "
        f"{outcome.final} replicas, {min(desired)} at least, {max(desired)} at most, "
        f"{outcome.replica_seconds / len(desired):.3g} on average"
    )


def values(scenario: Scenario, outcome: Outcome) -> dict[str, object]:
    """All of it, for programs. `timeline` has a row for each second in which something differs."""
    keys = list(scenario.tracks)
    timeline: list[dict[str, object]] = []
    for moment in outcome.moments:
        row: dict[str, object] = {
            "desired": moment.desired,
            "ready": moment.ready,
            **{_name(key): _finite(moment.values[key]) for key in keys},
        }
        if not timeline or {key: timeline[-1][key] for key in row} != row:
            timeline.append({"second": moment.second, **row})
    return {
        "seconds": scenario.seconds,
        "replicas": scenario.replicas,
        "final_replicas": outcome.final,
        "replica_seconds": outcome.replica_seconds,
        "decisions": [
            {
                "second": made.second,
                "from_replicas": made.before,
                "to_replicas": made.decision.desired,
                "cause": made.decision.cause,
                "reason": made.decision.reason,
                "verdicts": [
                    {
                        "rule": verdict.rule,
                        "fired": verdict.fired,
                        "value": verdict.value,
                        "reason": verdict.reason,
                    }
                    for verdict in made.decision.verdicts
                ],
            }
            for made in outcome.decisions
        ],
        "timeline": timeline,
    }


def drawing(scenario: Scenario, outcome: Outcome, width: int) -> list[str]:
    """Replicas, then the metrics that rules use, with the thresholds as dotted lines."""
    moments = outcome.moments
    lines = ["", *plot("replicas wanted", [float(m.desired) for m in moments], width=width)]
    thresholds_of: dict[Key, list[float]] = {}
    for one in scenario.rules:
        thresholds_of.setdefault((one.source, one.metric), []).append(one.threshold)
    used = [key for key in scenario.tracks if key in thresholds_of]
    for key in used[:PLOTS_MAX]:
        thresholds = thresholds_of[key]
        title = f"{_name(key)}{' of each replica' if scenario.tracks[key].shared else ''}"
        series = [moment.values[key] for moment in moments]
        lines += plot(title, series, width=width, marks=thresholds)
    axis = plot("", [0.0], width=width, seconds=scenario.seconds)[-2:]
    return [*lines, *axis]


def _decisions(outcome: Outcome) -> Table:
    rows = [
        [f"{one.second}s", f"{one.before} -> {one.decision.desired}", one.decision.cause, one.decision.reason]
        for one in outcome.decisions
    ]
    return Table(["AT", "REPLICAS", "BY", "WHY"], list(rows))


def _read(file: Path, rules: Sequence[ScalingRule] | None) -> Scenario:
    name = "stdin" if str(file) == "-" else str(file)
    if name == "stdin":
        content = sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
    else:
        with file.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
    text = decode(content, name, FILE_BYTES_MAX)
    if isinstance(text, Problem):
        raise invalid([text])

    def beside(path: str) -> str:
        try:
            with (Path(path) if name == "stdin" else file.parent / path).open("rb") as opened:
                found = decode(opened.read(FILE_BYTES_MAX + 1), path, FILE_BYTES_MAX)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        if isinstance(found, Problem):
            raise ValueError(f"{found.place}: {found.message}")
        return found

    return read_scenario(text, name, beside, rules=rules)


def _name(key: Key) -> str:
    return f"{key[0].value}/{key[1]}"


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or abs(value) < float("inf") else str(value)
