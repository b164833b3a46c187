"""Reads scaling rules: the key `scaling` of `dure apply`, `rules` of `dure rule simulate`. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from dure.client.rule_notation import (
    CONDITIONS,
    RuleFields,
    comparator_of,
    least,
    most,
    number_text,
    rule_of,
    source_word,
    type_word,
)
from dure.definitions.reader import Reader, join, kind
from dure.scaling.series import WINDOW_MS_MAX
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire import names
from dure.wire.quantities import parse_duration_s

RULES_MAX = 50
REPLICAS_MAX = 10_000
COOLDOWN_S_MAX = 7 * 86_400.0
# The names of the API and of Backend.AI are understood as well.
_ALIASES = {
    "metric_source": "source",
    "metric_name": "metric",
    "step_size": "step",
    "min_replicas": "min",
    "max_replicas": "max",
    "cooldown_seconds": "cooldown",
    "window_seconds": "window",
}
RULE_KEYS = (
    "name", "type", "source", "metric", *CONDITIONS, "comparator", "threshold", "step", "min", "max",
    "cooldown", "window", "clamp", "enabled",
)  # fmt: skip


def read_rules(reader: Reader, node: yaml.Node, path: str) -> list[ScalingRule]:
    """The rules of a list, with the last part of their names; one without a name is `rule-N`, N its place."""
    items = reader.sequence(node, path, "rules") or []
    if len(items) > RULES_MAX:
        reader.wrong(items[RULES_MAX], path, f"has more than {RULES_MAX} rules")
    rules: list[ScalingRule] = []
    lines: dict[str, int] = {}
    for index, item in enumerate(items[:RULES_MAX]):
        rule = _rule(reader, item, f"{path}[{index}]", f"rule-{index + 1}")
        if rule.name in lines:
            again = f"`{rule.name}` is in line {lines[rule.name]} already"
            reader.wrong(item, f"{path}[{index}].name", again)
        lines[rule.name] = item.start_mark.line + 1
        rules.append(rule)
    return rules


def _rule(reader: Reader, node: yaml.Node, path: str, default_name: str) -> ScalingRule:
    found = reader.mapping(node, path, (*RULE_KEYS, *_ALIASES)) or {}
    for alias, key in _ALIASES.items():
        if alias in found and key in found:
            reader.wrong(found[alias], join(path, alias), f"says the same as `{key}`: leave one of them out")
        elif alias in found:
            found[key] = found[alias]
    before = len(reader.problems)
    fields = RuleFields()
    name = reader.text(found.get("name"), join(path, "name")) or default_name
    problem = names.check_id(name, names.ENDPOINT_ID, "name")
    if problem is not None:
        reader.wrong(found["name"], join(path, "name"), problem.description)
    if "type" in found:
        fields["type"] = _word(reader, found["type"], join(path, "type"), type_word, "up")
    if isinstance(node, yaml.MappingNode):
        for key in ("source", "metric"):
            if key not in found:
                reader.wrong(node, join(path, key), "is required")
    if "source" in found:
        fields["source"] = _word(reader, found["source"], join(path, "source"), source_word, "proxy")
    fields["metric"] = reader.text(found.get("metric"), join(path, "metric"))
    _condition(reader, node, found, path, fields)
    # As most rules are written: one step at a time.
    fields["step"] = reader.integer(found.get("step"), join(path, "step"), 1, -REPLICAS_MAX, REPLICAS_MAX)
    if fields["step"] == 0:
        reader.wrong(found["step"], join(path, "step"), "must not be 0: such a rule changes nothing")
    if "min" in found:
        fields["min_replicas"] = reader.integer(found["min"], join(path, "min"), 0, 0, REPLICAS_MAX)
    if "max" in found:
        fields["max_replicas"] = reader.integer(found["max"], join(path, "max"), 10, 0, REPLICAS_MAX)
    if "cooldown" in found:
        fields["cooldown"] = _seconds(reader, found["cooldown"], join(path, "cooldown"), COOLDOWN_S_MAX)
    if "window" in found:
        fields["window"] = _seconds(reader, found["window"], join(path, "window"), WINDOW_MS_MAX / 1000)
    fields["clamp"] = reader.boolean(found.get("clamp"), join(path, "clamp"), False)
    fields["enabled"] = reader.boolean(found.get("enabled"), join(path, "enabled"), True)
    if len(reader.problems) > before:
        # Something to go on with: the file is refused anyway.
        return ScalingRule(name=name)
    rule, _ = rule_of(fields)
    rule.name = name
    if least(rule) > most(rule):
        at = found.get("min") or found.get("max") or node
        reader.wrong(at, join(path, "min"), f"is {least(rule)}, above `max`, which is {most(rule)}")
    return rule


def _condition(
    reader: Reader, node: yaml.Node, found: dict[str, yaml.Node], path: str, fields: RuleFields
) -> None:
    """One of the four words with a number, or comparator and threshold."""
    given = [key for key in (*CONDITIONS, "comparator") if key in found]
    if len(given) > 1:
        beside = f"stands beside `{given[0]}`: a rule has one condition"
        reader.wrong(found[given[1]], join(path, given[1]), beside)
    elif not given and isinstance(node, yaml.MappingNode):
        words = ", ".join(f"`{word}`" for word in CONDITIONS)
        reader.wrong(node, path, f"has no condition: write one of {words} with a number")
    elif given == ["comparator"]:
        at, key = found["comparator"], join(path, "comparator")
        fields["comparator"] = _word(reader, at, key, lambda text: comparator_of(text).value, "")
        if "threshold" not in found:
            reader.wrong(node, join(path, "threshold"), "is required beside `comparator`")
    if "threshold" in found and given[:1] not in ([], ["comparator"]):
        reader.wrong(found["threshold"], join(path, "threshold"), f"stands beside `{given[0]}`: leave it out")
    for key in (*given, "threshold"):
        if key in found and key != "comparator":
            text = reader.word(found[key], join(path, key))
            try:
                fields[key] = number_text(text)  # type: ignore[literal-required]
            except ValueError as error:
                reader.wrong(found[key], join(path, key), str(error))


def _word(reader: Reader, node: yaml.Node, path: str, known: Callable[[str], str], otherwise: str) -> Any:
    before = len(reader.problems)
    text = reader.text(node, path)
    if len(reader.problems) > before:
        return otherwise
    try:
        return known(text)
    except ValueError as error:
        reader.wrong(node, path, str(error))
        return otherwise


def _seconds(reader: Reader, node: yaml.Node, path: str, most_s: float) -> float:
    before = len(reader.problems)
    text = reader.word(node, path)
    if len(reader.problems) > before:
        return 0.0
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        reader.wrong(node, path, str(error))
        return 0.0
    if seconds > most_s:
        reader.wrong(node, path, f"found {kind(node)}, expected a duration of at most {most_s:g}s")
        return 0.0
    return seconds
