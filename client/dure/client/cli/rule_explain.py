"""`dure rule explain`: what the rules of an endpoint see, what they decided, and why."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import live, tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import dumps, emit, to_value
from dure.client.cli.rule import rule
from dure.client.cli.tables import Table
from dure.client.cli.text import age, clean, cut, duration_span
from dure.client.client import Client
from dure.client.rule_notation import condition_text, signed_step, source_text
from dure.v1.scaling_pb2 import ExplainScalingResponse, Metric, RuleVerdict, ScalingDecision, ScalingRule

POLL_S = 1.0
# How many metrics a page of inference servers may show before it hides everything else.
METRICS_SHOWN = 40


@command(rule, "explain", output=True, formats=("table", "wide", "json", "yaml"))
@click.argument("endpoint")
@click.option("-w", "--watch", is_flag=True, help="Go on, every second.")
@click.option("--decisions", "decisions_max", type=click.IntRange(1, 200), default=10, show_default=True)
async def explain(shell: Shell, endpoint: str, watch: bool, decisions_max: int) -> None:
    """Say what each rule sees now, why it fires or not, and what was decided lately.

    -o wide also shows every metric that rules could use.
    """
    async with shell.client() as client:
        if watch:
            await watch_scaling(shell, client, endpoint, decisions_max)
        else:
            await show_scaling(shell, client, endpoint, decisions_max)


async def show_scaling(shell: Shell, client: Client, endpoint: str, decisions_max: int = 10) -> None:
    answer = await client.rules.explain(endpoint, decisions_max=decisions_max)
    if shell.output in ("json", "yaml"):
        emit(answer, shell.output)
        return
    rules = [item async for item in client.rules.list(endpoint)]
    for line in lines(answer, rules, wide=shell.output == "wide", color=shell.color):
        click.echo(line, color=shell.color)


async def watch_scaling(shell: Shell, client: Client, endpoint: str, decisions_max: int) -> None:
    """In place on a terminal; elsewhere a new page, or a document in a line, whenever a verdict differs."""
    form = shell.output or "table"
    if form in ("table", "wide") and sys.stdout.isatty():
        with live.screen(stderr=False, transient=False) as draw:
            while True:
                answer = await client.rules.explain(endpoint, decisions_max=decisions_max)
                rules = [item async for item in client.rules.list(endpoint)]
                draw(lines(answer, rules, wide=form == "wide", color=shell.color))
                await asyncio.sleep(POLL_S)
    told = None
    while True:
        answer = await client.rules.explain(endpoint, decisions_max=decisions_max)
        # Values and ages change at every look; what fires, and what was decided, is news.
        news = [verdict.fired for verdict in answer.newest.verdicts], len(answer.decisions), answer.summary
        if news != told:
            told = news
            if form in ("json", "yaml"):
                value = dumps(to_value(answer), "line" if form == "json" else "yaml")
                click.echo(value if form == "json" else f"---\n{value}")
            else:
                rules = [item async for item in client.rules.list(endpoint)]
                for line in [*lines(answer, rules, wide=form == "wide", color=False), ""]:
                    click.echo(line)
            sys.stdout.flush()
        await asyncio.sleep(POLL_S)


def lines(
    answer: ExplainScalingResponse,
    rules: Sequence[ScalingRule],
    *,
    wide: bool,
    color: bool,
    now: datetime | None = None,
) -> list[str]:
    """The whole page: a sentence, the verdicts, the decisions, the metrics."""
    now = now or datetime.now(UTC)
    page = [clean(answer.summary)]
    if rules:
        page += ["", "Rules"]
        page += [f"  {line}" for line in _verdicts(answer.newest.verdicts, rules).lines(color=color)]
    if answer.decisions:
        page += ["", "Decisions, newest first"]
        page += [f"  {line}" for line in _decisions(answer.decisions, now).lines(color=color)]
    if answer.metrics:
        shown = answer.metrics if wide else _chosen(answer.metrics, rules)
        page += ["", "Metrics that rules can use"]
        page += [f"  {line}" for line in _metrics(shown).lines(color=color)]
        left = len(answer.metrics) - len(shown)
        if left > 0:
            page.append(f"  and {left} more: -o wide shows them all")
    return page


def _verdicts(verdicts: Sequence[RuleVerdict], rules: Sequence[ScalingRule]) -> Table:
    known = {tables.last(item.name): item for item in rules}
    rows = []
    for verdict in verdicts:
        item = known.get(tables.last(verdict.rule))
        if item is None:
            # Removed since rules were last looked at.
            continue
        rows.append(
            [
                tables.last(verdict.rule),
                "yes" if verdict.fired else "no",
                number(verdict.value),
                condition_text(item),
                f"{signed_step(item):+d}",
                verdict.reason,
            ]
        )
    seen = {row[0] for row in rows}
    rows += [
        [name, "", "", condition_text(item), f"{signed_step(item):+d}", "was not looked at yet"]
        for name, item in known.items()
        if name not in seen
    ]
    return Table(["RULE", "FIRES", "VALUE", "CONDITION", "STEP", "WHY"], list(rows))


def _decisions(decisions: Sequence[ScalingDecision], now: datetime) -> Table:
    rows = [
        [age(item.time, now), f"{item.from_replicas} -> {item.to_replicas}", item.cause, item.reason]
        for item in decisions
    ]
    return Table(["AGE", "REPLICAS", "BY", "WHY"], list(rows))


def _chosen(metrics: Sequence[Metric], rules: Sequence[ScalingRule]) -> list[Metric]:
    """As many as can be read: those that rules use first."""
    used = {(item.metric_source, item.metric_name) for item in rules}
    ranked = sorted(metrics, key=lambda metric: (metric.source, metric.name) not in used)
    return ranked[:METRICS_SHOWN]


def _metrics(metrics: Sequence[Metric]) -> Table:
    rows = [
        [source_text(item.source), item.name, number(item.value), duration_span(item.age)] for item in metrics
    ]
    return Table(["SOURCE", "METRIC", "VALUE", "AGE"], list(rows))


def number(value: float | str) -> str:
    """Four digits are enough to compare with a threshold by eye; empty without a value."""
    if value == "":
        return ""
    try:
        figure = float(value)
    except ValueError:
        return cut(clean(str(value)), 12)
    return f"{figure:,.0f}" if abs(figure) >= 10_000 else f"{figure:.4g}"
