"""A scaling rule of the public API: checked, changed by a mask, shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dure.manager import messages, schema
from dure.manager.asked import REPLICAS_MAX
from dure.manager.measures import KERNEL_METRICS, PROXY_METRICS
from dure.scaling.series import WINDOW_MS_MAX
from dure.scaling.values import Comparator, Source
from dure.v1 import scaling_pb2
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire import names
from dure.wire.errors import Violation

COOLDOWN_MS, COOLDOWN_MS_MAX = 300_000, 7 * 24 * 3600 * 1000
MAX_REPLICAS = 10
METRIC = re.compile(r"[A-Za-z_:][A-Za-z0-9_:.]{0,199}")
THRESHOLD = re.compile(r"[+-]?(\d{1,18}(\.\d{1,9})?|\.\d{1,9})([eE][+-]?\d{1,2})?")
UPDATABLE = (
    "type", "metric_source", "metric_name", "comparator", "threshold", "step_size", "min_replicas",
    "max_replicas", "cooldown", "window", "enabled", "clamp",
)  # fmt: skip
_SOURCES = {
    scaling_pb2.METRIC_SOURCE_INFERENCE_FRAMEWORK: Source.INFERENCE_FRAMEWORK,
    scaling_pb2.METRIC_SOURCE_KERNEL: Source.KERNEL,
    scaling_pb2.METRIC_SOURCE_PROXY: Source.PROXY,
}
_NAMES = {Source.KERNEL: KERNEL_METRICS, Source.PROXY: PROXY_METRICS}


def checked(rule: ScalingRule, violations: list[Violation]) -> dict[str, Any]:
    """Columns of a row; adds everything that is wrong to the violations."""

    def wrong(field: str, text: str) -> None:
        violations.append(Violation(f"rule.{field}", text))

    source = _SOURCES.get(rule.metric_source)
    if source is None:
        wrong("metric_source", "is required: INFERENCE_FRAMEWORK, KERNEL or PROXY")
    _check_metric(rule.metric_name, source, wrong)
    comparator = ""
    if not rule.comparator or rule.comparator not in scaling_pb2.Comparator.values():
        known = ", ".join(Comparator)
        wrong("comparator", f"is required: {known}")
    else:
        comparator = scaling_pb2.Comparator.Name(rule.comparator).removeprefix("COMPARATOR_")
    threshold = rule.threshold.strip()
    if not THRESHOLD.fullmatch(threshold):
        wrong("threshold", f"`{threshold[:40]}` is not a number" if threshold else "a number is required")
    step = _step(rule, wrong)
    low = rule.min_replicas if rule.HasField("min_replicas") else (0 if step < 0 else 1)
    high = rule.max_replicas if rule.HasField("max_replicas") else max(MAX_REPLICAS, low)
    for field, value in (("min_replicas", low), ("max_replicas", high)):
        if not 0 <= value <= REPLICAS_MAX:
            wrong(field, f"found {value}, expected 0 to {REPLICAS_MAX}")
    if low > high:
        wrong("min_replicas", f"{low} is above max_replicas, {high}")
    cooldown_ms = rule.cooldown.ToNanoseconds() // 1_000_000 if rule.HasField("cooldown") else COOLDOWN_MS
    if not 0 <= cooldown_ms <= COOLDOWN_MS_MAX:
        wrong("cooldown", "must be from 0 s to 7 days")
    window_ms = rule.window.ToNanoseconds() // 1_000_000 if rule.HasField("window") else 0
    if not 0 <= window_ms <= WINDOW_MS_MAX:
        wrong("window", f"must be from 0 s to {WINDOW_MS_MAX // 1000} s")
    return {
        "source": source.value if source is not None else "",
        "metric": rule.metric_name,
        "comparator": comparator,
        "threshold": threshold,
        "step": step,
        "min_replicas": low,
        "max_replicas": high,
        "cooldown_ms": cooldown_ms,
        "window_ms": window_ms,
        "enabled": rule.enabled if rule.HasField("enabled") else True,
        "clamp": rule.clamp,
    }


def _check_metric(name: str, source: Source | None, wrong: Any) -> None:
    if not METRIC.fullmatch(name):
        wrong("metric_name", f"`{name[:80]}` is not the name of a metric" if name else "is required")
    elif source in _NAMES and name not in _NAMES[source]:
        wrong("metric_name", f"`{name}` is not measured; known: {', '.join(_NAMES[source])}")


def _step(rule: ScalingRule, wrong: Any) -> int:
    """Signed: positive adds replicas. A negative step means scale down, whatever the type says."""
    step = rule.step_size
    if rule.type not in scaling_pb2.ScalingType.values():
        wrong("type", "must be SCALE_UP or SCALE_DOWN")
    if step == 0:
        wrong("step_size", "must not be 0")
    if abs(step) > REPLICAS_MAX:
        wrong("step_size", f"found {step}, expected at most {REPLICAS_MAX}")
    return -abs(step) if rule.type == scaling_pb2.SCALING_TYPE_SCALE_DOWN else step


def merged(current: ScalingRule, wanted: ScalingRule, paths: Sequence[str]) -> ScalingRule:
    """`current` with the fields of `wanted` that the mask names."""
    result = ScalingRule()
    result.CopyFrom(current)
    for path in paths:
        result.ClearField(path)  # type: ignore[arg-type]
        field = wanted.DESCRIPTOR.fields_by_name[path]
        if field.message_type is not None:
            if wanted.HasField(path):  # type: ignore[arg-type]
                getattr(result, path).CopyFrom(getattr(wanted, path))
        elif not field.has_presence or wanted.HasField(path):  # type: ignore[arg-type]
            setattr(result, path, getattr(wanted, path))
    if "step_size" in paths and "type" not in paths and wanted.step_size < 0:
        # As in a new rule, a negative step means down; a positive one keeps the direction that there is.
        result.type = scaling_pb2.SCALING_TYPE_SCALE_DOWN
    return result


def shown_rule(row: schema.ScalingRule, project: str, endpoint: str) -> ScalingRule:
    rule = ScalingRule(
        name=names.rule(project, endpoint, row.name),
        uid=row.uid,
        type=scaling_pb2.SCALING_TYPE_SCALE_UP if row.step > 0 else scaling_pb2.SCALING_TYPE_SCALE_DOWN,
        metric_source=next(key for key, value in _SOURCES.items() if value == row.source),
        metric_name=row.metric,
        comparator=scaling_pb2.Comparator.Value(f"COMPARATOR_{row.comparator}"),
        threshold=row.threshold,
        step_size=abs(row.step),
        min_replicas=row.min_replicas,
        max_replicas=row.max_replicas,
        enabled=row.enabled,
        clamp=row.clamp,
        create_time=messages.timestamp(row.created_ms),
    )
    rule.cooldown.FromMilliseconds(row.cooldown_ms)
    rule.window.FromMilliseconds(row.window_ms)
    if row.fired_ms:
        rule.fire_time.CopyFrom(messages.timestamp(row.fired_ms))
    return rule
