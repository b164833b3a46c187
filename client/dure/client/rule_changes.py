"""What must be done to make an endpoint's rules those of a file, in the file's order. Pure.

Rules are looked at in the order of their creation, those that scale up apart from those that scale down. So
a rule that stands elsewhere in the file than it was made is made anew; that it cools down is then forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dure.client.manifest import Change
from dure.client.rule_notation import complete, direction, rule_text, rule_values
from dure.v1.scaling_pb2 import ScalingRule

# Key of a file -> fields of the message.
_PATHS = {
    "type": ("type", "step_size"),
    "source": ("metric_source",),
    "metric": ("metric_name",),
    "above": ("comparator", "threshold"),
    "at_least": ("comparator", "threshold"),
    "below": ("comparator", "threshold"),
    "at_most": ("comparator", "threshold"),
    "step": ("type", "step_size"),
    "min": ("min_replicas",),
    "max": ("max_replicas",),
    "cooldown": ("cooldown",),
    "window": ("window",),
    "clamp": ("clamp",),
    "enabled": ("enabled",),
}


@dataclass(frozen=True)
class RuleStep:
    """One call. `rule` has the name's last part; `paths` are those of an update's mask."""

    verb: Literal["remove", "update", "add"]
    rule: ScalingRule
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class RulePlan:
    """Calls in their order, and what they change, for people."""

    steps: tuple[RuleStep, ...] = ()
    changes: tuple[Change, ...] = field(default=())


def plan_rules(current: Sequence[ScalingRule], wanted: Sequence[ScalingRule]) -> RulePlan:
    """`current` oldest first, `wanted` as the file has them."""
    there = {_id(rule): rule for rule in current}
    kept = _kept(current, wanted)
    removes, updates, adds, changes = [], [], [], []
    names = {_id(rule) for rule in wanted}
    for name, rule in there.items():
        if name not in names:
            removes.append(RuleStep("remove", rule))
            changes.append(Change(f"scaling.{name}", rule_text(rule), None))
    for rule in wanted:
        name = _id(rule)
        before = there.get(name)
        if before is None:
            adds.append(RuleStep("add", complete(rule)))
            changes.append(Change(f"scaling.{name}", None, rule_text(rule)))
            continue
        found = _differences(before, rule)
        changes += [Change(f"scaling.{name}.{key}", *values) for key, values in found.items()]
        if name not in kept:
            removes.append(RuleStep("remove", before))
            adds.append(RuleStep("add", complete(rule)))
            changes.append(Change(f"scaling.{name}.order", "as it was made", "made anew, to stand as here"))
        elif found:
            paths = dict.fromkeys(path for key in found for path in _PATHS[key])
            updates.append(RuleStep("update", complete(rule), tuple(paths)))
    return RulePlan((*removes, *updates, *adds), tuple(changes))


def _kept(current: Sequence[ScalingRule], wanted: Sequence[ScalingRule]) -> set[str]:
    """Names of rules that can stay: of each direction the beginning of the file that is in order."""
    position = {_id(rule): index for index, rule in enumerate(current)}
    kept: set[str] = set()
    for way in ("up", "down"):
        newest = -1
        for rule in wanted:
            if direction(rule) != way:
                continue
            index = position.get(_id(rule), len(current))
            if index < newest:
                # All that follow come after it, too: whatever is kept was made before what is made now.
                break
            newest = index
            if index < len(current):
                kept.add(_id(rule))
    return kept


def _differences(before: ScalingRule, after: ScalingRule) -> dict[str, tuple[str | None, str | None]]:
    old, new = rule_values(before), rule_values(after)
    keys = dict.fromkeys((*new, *old))
    return {
        key: (_text(old.get(key)), _text(new.get(key)))
        for key in keys
        if key != "name" and old.get(key) != new.get(key)
    }


def _text(value: object) -> str | None:
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def _id(rule: ScalingRule) -> str:
    return rule.name.rsplit("/", 1)[-1]
