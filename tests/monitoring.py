"""What docs/grafana/dure.json and docs/alerts.yml ask Prometheus for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DOCS = Path(__file__).parents[1] / "docs"
_RATES = ("rate", "increase", "irate")


@dataclass(frozen=True)
class Wanted:
    """A selector of an expression: metric, labels and their values, and whether it is under a rate."""

    where: str
    metric: str
    labels: tuple[tuple[str, str], ...]
    rated: bool


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DOCS / "grafana" / "dure.json").read_text(encoding="utf-8")))


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DOCS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where one stands, and its text, with the variables of the dashboard filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "1m")
            yield f"panel {panel['title']}", text.replace("$project", ".*").replace("$endpoint", ".*")
    for rule in alerts():
        yield f"alert {rule['alert']}", rule["expr"]


def wanted() -> list[Wanted]:
    """Every selector. An expression that is none raises ValueError."""
    return [
        found
        for where, text in expressions()
        for found in _selectors(where, promql_parser.parse(text), False)
    ]


def _selectors(where: str, node: Any, rated: bool) -> Iterator[Wanted]:
    match node:
        case promql_parser.VectorSelector():
            labels = tuple((m.name, m.value) for m in node.matchers.matchers)
            yield Wanted(where, node.name, labels, rated)
        case promql_parser.MatrixSelector():
            yield from _selectors(where, node.vector_selector, rated)
        case promql_parser.Call():
            for argument in node.args:
                yield from _selectors(where, argument, rated or node.func.name in _RATES)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from _selectors(where, node.expr, rated)
        case promql_parser.BinaryExpr():
            yield from _selectors(where, node.lhs, rated)
            yield from _selectors(where, node.rhs, rated)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise AssertionError(f"{where}: {node!r} is not known here")
