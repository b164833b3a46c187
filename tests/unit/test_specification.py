"""docs/specification.md names files and tests that exist, and commands that are understood."""

from __future__ import annotations

import ast
import re
import shlex
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from dure.client.cli.main import root

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("client", "manager", "agent", "appproxy")


class Row(NamedTuple):
    feature: str
    files: str
    tests: str
    commands: str


def rows() -> list[Row]:
    lines = (ROOT / "docs" / "specification.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert all(len(row) == 4 for row in cells), [row for row in cells if len(row) != 4]
    return [Row(*row) for row in cells if row[0] != "feature" and not set(row[0]) <= {"-"}]


def quoted(cell: str) -> list[str]:
    found = re.findall(r"`([^`]+)`", cell)
    assert found, cell
    return found


@cache
def functions_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature[:40])
def test_a_row(row: Row, tmp_path: Path) -> None:
    for name in quoted(row.files):
        assert any((ROOT / part / "dure" / name).is_file() for part in PARTS), name
    for name in quoted(row.tests):
        path, _, function = name.partition("::")
        assert function in functions_in(ROOT / "tests" / path), name
    for line in quoted(row.commands):
        understood(line, tmp_path)


def understood(line: str, empty: Path) -> None:
    """Raises click.UsageError for an unknown command, option or value. Nothing is run.

    Files that it reads are there, in a directory that was empty.
    """
    program, *words = shlex.split(line)
    assert program == "dure"
    group: click.Command = root
    context = click.Context(group, info_name=program)
    while isinstance(group, click.Group) and words and words[0] != "--help":
        name, found, words = group.resolve_command(context, words)
        assert found is not None and name is not None, line
        group, context = found, click.Context(found, info_name=name, parent=context)
    assert not isinstance(group, click.Group) or words, f"`{line}` names no command"
    if words != ["--help"]:
        for word in words:
            if word.endswith((".yaml", ".env")):
                (empty / word).parent.mkdir(exist_ok=True)
                (empty / word).touch()
        with chdir(empty):
            group.make_context(group.name, words)


def test_what_is_not_understood_is_found(tmp_path: Path) -> None:
    for line in ("dure endpoint explode x", "dure endpoint get x --nothing", "dure endpoint scale x many"):
        with pytest.raises(click.UsageError):
            understood(line, tmp_path)
    assert len(rows()) > 100
