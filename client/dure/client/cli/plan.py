"""What a change does, for people: the fields that differ, and what becomes of the replicas."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dure.client.cli.text import clean
from dure.client.manifest import Change, changes
from dure.client.notation import duration_text
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint, RolloutPolicy

_COLORS = {"+": "green", "-": "red", "~": "yellow"}


def lines(before: Endpoint | None, after: Endpoint, *, color: bool) -> list[str]:
    """The changed fields, one on each line."""
    return [line(change, color=color) for change in changes(before, after)]


def line(change: Change, *, color: bool) -> str:
    text = clean(str(change))
    return click.style(text, fg=_COLORS[text[0]]) if color else text


def effect(before: Endpoint | None, after: Endpoint, rules: Sequence[Change] = ()) -> str:
    """What a change does, that of its scaling rules included, in a sentence without its end."""
    count = len({change.path.split(".")[1] for change in rules})
    ruled = f"{count} scaling rule{'' if count == 1 else 's'} changed" if count else ""
    text = _effect(before, after)
    if not ruled or text == "nothing to change":
        return ruled or text
    return f"{text}; {ruled}"


def _effect(before: Endpoint | None, after: Endpoint) -> str:
    if before is None:
        count = after.replica_count
        return f"a new endpoint with {count} replica{'' if count == 1 else 's'}"
    made = before.revision != after.revision
    changed = changes(before, after)
    if not made and not changed:
        return "nothing to change"
    scaled = next((change for change in changed if change.path == "replicas"), None)
    parts = []
    if made:
        files = "" if [c for c in changed if c.path != "replicas"] else "the files of the model changed; "
        parts.append(f"{files}makes revision {after.revision}")
        parts.append(
            _replacement(after) if before.desired_replicas else "it is started once replicas are wanted"
        )
    else:
        parts.append("no new revision")
    if scaled is not None:
        parts.append(f"replicas {scaled.before} -> {scaled.after}")
    return "; ".join(parts)


def _replacement(endpoint: Endpoint) -> str:
    policy = endpoint.rollout_policy
    match policy.strategy:
        case endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN:
            when = "when it is promoted" if policy.manual_switch else "at once when they are healthy"
            return f"as many new replicas start beside the old ones, and all requests move {when}"
        case endpoint_pb2.ROLLOUT_STRATEGY_CANARY:
            return f"it gets {_steps(policy)} of the requests, then all"
        case _:
            surge, missing = policy.max_surge or "1", policy.max_unavailable or "0"
            if (surge, missing) == ("1", "0"):
                return "replicas are replaced one by one, each once its successor is healthy"
            return f"replicas are replaced with at most {surge} more and {missing} fewer meanwhile"


def _steps(policy: RolloutPolicy) -> str:
    if not policy.steps:
        return "10% (until it is promoted)"
    return ", then ".join(
        f"{step.weight}% "
        + (f"(for {duration_text(step.hold)})" if step.HasField("hold") else "(until it is promoted)")
        for step in policy.steps
    )
