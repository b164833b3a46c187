"""Reads the files of `dure rule simulate`: rules and series, written by hand or by `dure rule record`. Pure.

rules: [...]                    as under `scaling` of `dure apply`
replicas: 1                     at the beginning
seconds: 600                    default: until the last value
ready_after: 5s                 how long a new replica takes to serve
scale_to_zero_after: 5m
series:
  proxy/concurrency:            SOURCE/METRIC, or the metric alone where the rules say whose
    shared: true                a total, divided by the replicas that serve
    points: [[0, 3], [60, 40]]  seconds and values; a value holds until the next, null: not measured
  cpu_util: load.csv            a file beside this one, or its lines as text
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence

import yaml

from dure.client.rule_notation import decidable, source_word
from dure.client.rule_reader import read_rules
from dure.client.simulation import SECONDS_MAX, Key, Scenario, Track, length_s
from dure.definitions.problems import invalid, shown
from dure.definitions.reader import Reader, is_null, join, kind
from dure.scaling.values import Rule, Source
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire.quantities import parse_duration_s

FILE_BYTES_MAX = 8 << 20
SERIES_MAX, POINTS_MAX = 500, 200_000
KEYS = ("rules", "replicas", "seconds", "ready_after", "scale_to_zero_after", "series")
_SERIES_KEYS = ("points", "shared")


def read_scenario(
    text: str,
    file: str,
    read: Callable[[str], str],
    *,
    rules: Sequence[ScalingRule] | None = None,
) -> Scenario:
    """`read` returns the text of a file beside this one, or raises ValueError; `rules` go over the file's.

    Raises InvalidInput with every problem of the file.
    """
    reader = Reader(file)
    root = reader.load(text, f"a mapping with the keys {', '.join(KEYS)}")
    found: list[Scenario] = []
    if root is not None:
        reader.walk(lambda: found.append(_scenario(reader, root, read, rules)))
    if reader.problems:
        raise invalid(reader.problems)
    return found[0]


def _scenario(
    reader: Reader, root: yaml.Node, read: Callable[[str], str], given: Sequence[ScalingRule] | None
) -> Scenario:
    found = reader.mapping(root, "", KEYS) or {}
    before = len(reader.problems)
    messages = list(given or ())
    if given is None and "rules" in found:
        messages = read_rules(reader, found["rules"], "rules")
    if given is None and "rules" not in found:
        reader.wrong(root, "rules", "is required, unless --rules-of takes those of an endpoint")
    # Without rules that can be read nobody can say whose a bare metric is.
    rules = decidable(messages) if len(reader.problems) == before else None
    tracks: dict[Key, Track] = {}
    if "series" not in found:
        reader.wrong(root, "series", "is required")
    else:
        entries = reader.entries(found["series"], "series", "metrics and their values") or {}
        if len(entries) > SERIES_MAX:
            reader.wrong(found["series"], "series", f"has more than {SERIES_MAX} series")
        for name, (key_node, node) in list(entries.items())[:SERIES_MAX]:
            path = join("series", shown(name))
            key = _key(reader, key_node, name, path, rules)
            track = _track(reader, node, path, name, read)
            if key is not None and track is not None:
                if key in tracks:
                    reader.wrong(key_node, path, "stands here twice")
                tracks[key] = track
    until = reader.integer(found.get("seconds"), "seconds", length_s(tracks), 1, SECONDS_MAX)
    return Scenario(
        tuple(rules or ()),
        tracks,
        replicas=reader.integer(found.get("replicas"), "replicas", 1, 0, 10_000),
        seconds=until,
        ready_after_s=round(_duration(reader, found.get("ready_after"), "ready_after")),
        scale_to_zero_s=_duration(reader, found.get("scale_to_zero_after"), "scale_to_zero_after"),
    )


def _key(reader: Reader, node: yaml.Node, name: str, path: str, rules: Sequence[Rule] | None) -> Key | None:
    """Source and metric; a metric alone is that of the rules that name it."""
    word, slash, metric = name.partition("/")
    if slash:
        try:
            return Source(source_word(word)), metric
        except ValueError as error:
            reader.wrong(node, path, str(error))
            return None
    if rules is None:
        return None
    sources = sorted({rule.source for rule in rules if rule.metric == name})
    if len(sources) == 1:
        return sources[0], name
    why = "rules use it from several sources" if sources else "no rule uses it"
    reader.wrong(node, path, f"whose metric is it? {why}: write SOURCE/METRIC, such as `proxy/{shown(name)}`")
    return None


def _track(reader: Reader, node: yaml.Node, path: str, name: str, read: Callable[[str], str]) -> Track | None:
    shared = False
    if isinstance(node, yaml.MappingNode):
        found = reader.mapping(node, path, _SERIES_KEYS, required=("points",)) or {}
        shared = reader.boolean(found.get("shared"), join(path, "shared"), False)
        if "points" not in found:
            return None
        node, path = found["points"], join(path, "points")
    points: list[tuple[float, float | None]] = []
    before = len(reader.problems)
    if isinstance(node, yaml.ScalarNode) and not is_null(node):
        points = _lines(reader, node, path, name, read)
    else:
        for index, item in enumerate(reader.sequence(node, path, "pairs [SECONDS, VALUE]") or ()):
            pair = _pair(reader, item, f"{path}[{index}]")
            if pair is not None:
                points.append(pair)
    if len(reader.problems) > before:
        return None
    if not points:
        reader.wrong(node, path, "has no values")
        return None
    for (earlier, _), (later, _) in itertools.pairwise(points):
        if later <= earlier:
            reader.wrong(node, path, f"seconds must ascend: {later:g} comes after {earlier:g}")
            return None
    seconds, values = zip(*points, strict=True)
    return Track(seconds, values, shared)


def _pair(reader: Reader, node: yaml.Node, path: str) -> tuple[float, float | None] | None:
    items = reader.sequence(node, path, "two numbers, [SECONDS, VALUE]")
    if items is None:
        return None
    if len(items) != 2:
        reader.wrong(node, path, f"has {len(items)} values, expected two: [SECONDS, VALUE]")
        return None
    expected = f"seconds from 0 to {SECONDS_MAX}"
    at = reader.number(items[0], path, -1.0, lambda n: 0 <= n <= SECONDS_MAX, expected)
    if is_null(items[1]):
        return at, None
    value = _float(items[1].value) if isinstance(items[1], yaml.ScalarNode) else None
    if value is None:
        reader.wrong(items[1], path, f"found {kind(items[1])}, expected a number, or null for none")
    return at, value


def _lines(
    reader: Reader, node: yaml.ScalarNode, path: str, name: str, read: Callable[[str], str]
) -> list[tuple[float, float | None]]:
    """Lines of SECONDS,VALUE: in the text itself if it has several, else of the file that it names."""
    text, where = str(node.value), ""
    if "\n" not in text.strip() and "," not in text:
        where = f"{shown(text)}: "
        try:
            text = read(text.strip())
        except ValueError as error:
            reader.wrong(node, path, str(error))
            return []
    points: list[tuple[float, float | None]] = []
    column = 1
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        row = [cell.strip() for cell in row]
        if not any(row) or row[0].startswith("#"):
            continue
        if not points and _float(row[0]) is None and number == 1:
            # A header: with several columns, ours is the one that bears the metric's name.
            column = next((index for index, cell in enumerate(row) if index and cell == name), 1)
            continue
        at = _float(row[0])
        cell = row[column] if len(row) > column else ""
        value = None if cell in ("", "null") else _float(cell)
        if at is None or not 0 <= at <= SECONDS_MAX or (value is None and cell not in ("", "null")):
            line = f"{where}line {number}: found `{shown(','.join(row))}`"
            reader.wrong(node, path, f"{line}, expected SECONDS,VALUE")
            return []
        if len(points) >= POINTS_MAX:
            reader.wrong(node, path, f"{where}has more than {POINTS_MAX} values")
            return []
        points.append((at, value))
    return points


def _float(text: str) -> float | None:
    """Also `nan` and `.inf`: what servers may say, and what must never scale anything."""
    try:
        return float(text.strip().lower().replace(".nan", "nan").replace(".inf", "inf"))
    except ValueError:
        return None


def _duration(reader: Reader, node: yaml.Node | None, path: str) -> float:
    if node is None:
        return 0.0
    before = len(reader.problems)
    text = reader.word(node, path)
    if len(reader.problems) > before:
        return 0.0
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        reader.wrong(node, path, str(error))
        return 0.0
    if not math.isfinite(seconds) or seconds > SECONDS_MAX:
        reader.wrong(node, path, f"found {kind(node)}, expected a duration of at most {SECONDS_MAX} s")
        return 0.0
    return seconds
