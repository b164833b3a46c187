"""Scaling rules as people write them: words, keyword arguments, values of files. Pure.

A rule says by what, and how far: `proxy concurrency > 8: +2`. The same rule can be written with `type: down`
and `step: 1`, or with `step: -1` alone; everything here compares and shows the former.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, TypedDict

from google.protobuf.duration_pb2 import Duration

from dure.client.notation import duration_text, set_duration
from dure.definitions.problems import unknown
from dure.scaling.values import SYMBOLS, Comparator, Rule, Source
from dure.v1 import scaling_pb2
from dure.v1.scaling_pb2 import MetricSource, ScalingRule, ScalingType
from dure.wire.errors import InvalidInput, Violation

DEFAULT_MAX, DEFAULT_COOLDOWN_S = 10, 300.0
TYPES: dict[str, ScalingType.ValueType] = {
    "up": scaling_pb2.SCALING_TYPE_SCALE_UP,
    "down": scaling_pb2.SCALING_TYPE_SCALE_DOWN,
}
SOURCES: dict[str, MetricSource.ValueType] = {
    "inference-framework": scaling_pb2.METRIC_SOURCE_INFERENCE_FRAMEWORK,
    "kernel": scaling_pb2.METRIC_SOURCE_KERNEL,
    "proxy": scaling_pb2.METRIC_SOURCE_PROXY,
}
_PROTO_COMPARATORS: dict[Comparator, scaling_pb2.Comparator.ValueType] = {
    Comparator.LESS_THAN: scaling_pb2.COMPARATOR_LESS_THAN,
    Comparator.LESS_THAN_OR_EQUAL: scaling_pb2.COMPARATOR_LESS_THAN_OR_EQUAL,
    Comparator.GREATER_THAN: scaling_pb2.COMPARATOR_GREATER_THAN,
    Comparator.GREATER_THAN_OR_EQUAL: scaling_pb2.COMPARATOR_GREATER_THAN_OR_EQUAL,
}
# How a condition is said in one word: `above: 8`.
CONDITIONS: dict[str, Comparator] = {
    "above": Comparator.GREATER_THAN,
    "at_least": Comparator.GREATER_THAN_OR_EQUAL,
    "below": Comparator.LESS_THAN,
    "at_most": Comparator.LESS_THAN_OR_EQUAL,
}
_COMPARATOR_WORDS: Mapping[str, Comparator] = {
    **{word.replace("_", "-"): comparator for word, comparator in CONDITIONS.items()},
    **{symbol: comparator for comparator, symbol in SYMBOLS.items()},
    **{comparator.value.lower().replace("_", "-"): comparator for comparator in Comparator},
}
_DURATIONS = ("cooldown", "window")
# Keyword of the library -> field of the message, where it differs.
_FIELDS = {"source": "metric_source", "metric": "metric_name", "step": "step_size"}

Word = Literal["up", "down"]
SourceWord = Literal["inference-framework", "kernel", "proxy"]
Number = str | int | float | Decimal


class RuleFields(TypedDict, total=False):
    """A rule in keywords. One of `above`, `at_least`, `below`, `at_most`, or `comparator` with `threshold`.

    Durations are seconds or timedeltas. What is left out is the manager's default for a new rule, and stays
    as it is for another.
    """

    type: Word
    source: SourceWord
    metric: str
    above: Number
    at_least: Number
    below: Number
    at_most: Number
    comparator: str
    threshold: Number
    step: int
    min_replicas: int
    max_replicas: int
    cooldown: float | timedelta
    window: float | timedelta
    enabled: bool
    clamp: bool


def rule_of(fields: RuleFields) -> tuple[ScalingRule, list[str]]:
    """The message with these fields, and the paths of a mask that names them. Raises InvalidInput."""
    rule, paths, wrong = ScalingRule(), [], []
    conditions = [key for key in (*CONDITIONS, "comparator") if key in fields]
    if len(conditions) > 1:
        wrong.append(Violation(conditions[1], f"says the same as `{conditions[0]}`: give one of them"))
    for key, value in fields.items():
        names = ("comparator", "threshold") if key in CONDITIONS else (_FIELDS.get(key, key),)
        paths += [name for name in names if name not in paths]
        try:
            _put(rule, key, value)
        except ValueError as error:
            wrong.append(Violation(key, str(error)))
    if wrong:
        raise InvalidInput.of(wrong)
    if rule.type == TYPES["down"]:
        rule.step_size = abs(rule.step_size)
    return rule, paths


def _put(rule: ScalingRule, key: str, value: Any) -> None:
    if key in CONDITIONS:
        rule.comparator = _PROTO_COMPARATORS[CONDITIONS[key]]
        rule.threshold = number_text(value)
    elif key == "threshold":
        rule.threshold = number_text(value)
    elif key == "comparator":
        rule.comparator = _PROTO_COMPARATORS[comparator_of(str(value))]
    elif key == "type":
        rule.type = TYPES[type_word(str(value))]
    elif key == "source":
        rule.metric_source = SOURCES[source_word(str(value))]
    elif key in _DURATIONS:
        seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
        set_duration(getattr(rule, key), seconds)
    else:
        setattr(rule, _FIELDS.get(key, key), value)


def type_word(text: str) -> Word:
    """`up` or `down`, also of `scale-up`, `SCALE_UP`, `Scale Up`. Raises ValueError."""
    word = _form(text).removeprefix("scaling-type-").removeprefix("scale-")
    if word == "up":
        return "up"
    if word == "down":
        return "down"
    raise ValueError(f"`{text[:60]}` is no type of a rule: write up or down")


def source_word(text: str) -> SourceWord:
    """Raises ValueError for what is no source."""
    word = _form(text).removeprefix("metric-source-")
    for known in ("inference-framework", "kernel", "proxy"):
        if word == known:
            return known
    raise ValueError(f"`{text[:60]}` is no source of metrics; {unknown(word, SOURCES)}")


def comparator_of(text: str) -> Comparator:
    """Of `above`, `>`, `GREATER_THAN`. Raises ValueError."""
    word = _form(text).removeprefix("comparator-")
    if word not in _COMPARATOR_WORDS:
        raise ValueError(f"`{text[:60]}` is no comparator; known: {', '.join(_COMPARATOR_WORDS)}")
    return _COMPARATOR_WORDS[word]


def number_text(value: Any) -> str:
    """A threshold as a decimal string. Raises ValueError for what is no finite number."""
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        raise ValueError(f"`{str(value)[:60]}` is no number; write one such as 8 or 0.75") from None
    if not number.is_finite() or abs(number) >= Decimal("1e30"):
        raise ValueError(f"`{str(value)[:60]}` is no number that a metric can be compared with")
    number = number.normalize()
    return f"{number:f}" if number else "0"


def direction(rule: ScalingRule) -> Word:
    """Which way it goes, however that is said."""
    return "down" if rule.type == TYPES["down"] or rule.step_size < 0 else "up"


def signed_step(rule: ScalingRule) -> int:
    return -abs(rule.step_size) if direction(rule) == "down" else rule.step_size


def least(rule: ScalingRule) -> int:
    if rule.HasField("min_replicas"):
        return rule.min_replicas
    return 0 if direction(rule) == "down" else 1


def most(rule: ScalingRule) -> int:
    return rule.max_replicas if rule.HasField("max_replicas") else max(DEFAULT_MAX, least(rule))


def comparator(rule: ScalingRule) -> Comparator | None:
    """None if the message has none that we know."""
    return next((ours for ours, theirs in _PROTO_COMPARATORS.items() if theirs == rule.comparator), None)


def source_text(number: int) -> str:
    """`proxy`; the number for a source that is newer than we are."""
    return next((word for word, known in SOURCES.items() if known == number), str(number))


def condition_text(rule: ScalingRule) -> str:
    """`proxy concurrency > 8`."""
    compared = comparator(rule)
    symbol = SYMBOLS[compared] if compared is not None else "?"
    return f"{source_text(rule.metric_source)} {rule.metric_name} {symbol} {rule.threshold}"


def rule_text(rule: ScalingRule) -> str:
    """The whole of it in a line: `proxy concurrency > 8: +2, within 1 to 10, cooldown 300s`."""
    parts = [
        f"{signed_step(rule):+d}",
        f"within {least(rule)} to {most(rule)}",
        f"cooldown {_seconds(rule.cooldown, rule.HasField('cooldown'), DEFAULT_COOLDOWN_S)}",
    ]
    if rule.window.ToNanoseconds():
        parts.append(f"window {duration_text(rule.window)}")
    parts += ["clamp"] if rule.clamp else []
    parts += ["switched off"] if not is_enabled(rule) else []
    return f"{condition_text(rule)}: {', '.join(parts)}"


def complete(rule: ScalingRule) -> ScalingRule:
    """The same rule with every default said."""
    said = ScalingRule()
    said.CopyFrom(rule)
    said.type, said.step_size = TYPES[direction(rule)], abs(rule.step_size)
    said.min_replicas, said.max_replicas, said.enabled = least(rule), most(rule), is_enabled(rule)
    if not rule.HasField("cooldown"):
        set_duration(said.cooldown, DEFAULT_COOLDOWN_S)
    said.window.SetInParent()
    return said


def is_enabled(rule: ScalingRule) -> bool:
    return rule.enabled if rule.HasField("enabled") else True


def rule_values(rule: ScalingRule) -> dict[str, Any]:
    """The values of a file that asks for it; what is at its default is left out."""
    compared, way = comparator(rule), direction(rule)
    word = next((word for word, known in CONDITIONS.items() if known == compared), "comparator")
    values: dict[str, Any] = {
        "name": rule.name.rsplit("/", 1)[-1],
        "type": way,
        "source": source_text(rule.metric_source),
        "metric": rule.metric_name,
        word: _plain_number(rule.threshold),
        "step": abs(rule.step_size),
    }
    if least(rule) != (0 if way == "down" else 1):
        values["min"] = least(rule)
    if most(rule) != max(DEFAULT_MAX, least(rule)):
        values["max"] = most(rule)
    if rule.HasField("cooldown") and rule.cooldown.ToNanoseconds() != DEFAULT_COOLDOWN_S * 1e9:
        values["cooldown"] = duration_text(rule.cooldown)
    if rule.window.ToNanoseconds():
        values["window"] = duration_text(rule.window)
    if rule.clamp:
        values["clamp"] = True
    if not is_enabled(rule):
        values["enabled"] = False
    return values


def decidable(rules: Sequence[ScalingRule]) -> list[Rule]:
    """The rules as `dure.scaling.decide` takes them, as if none had ever fired."""
    return [
        Rule(
            name=rule.name.rsplit("/", 1)[-1],
            source=Source(source_text(rule.metric_source)),
            metric=rule.metric_name,
            comparator=comparator(rule) or Comparator.GREATER_THAN,
            threshold=float(rule.threshold),
            step=signed_step(rule),
            min_replicas=least(rule),
            max_replicas=most(rule),
            cooldown_ms=rule.cooldown.ToMilliseconds()
            if rule.HasField("cooldown")
            else round(DEFAULT_COOLDOWN_S * 1000),
            window_ms=rule.window.ToMilliseconds(),
            enabled=is_enabled(rule),
            clamp=rule.clamp,
        )
        for rule in rules
    ]


def _plain_number(text: str) -> Any:
    number = Decimal(number_text(text))
    return int(number) if number == number.to_integral_value() else float(number)


def _seconds(duration: Duration, there: bool, default_s: float) -> str:
    return duration_text(duration) if there else f"{default_s:g}s"


def _form(text: str) -> str:
    return text.strip().lower().replace("_", "-").replace(" ", "-")
