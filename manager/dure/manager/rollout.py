"""How a new revision takes the place of the one before: a function of the policy, a state and the clock.

A rollout goes on while the wanted revision is not the stable one. Its state is small and stored with the
endpoint; the reconciler asks `targets` how many replicas of each side there may be, and `pools` says how
requests are split. Three strategies:

    ROLLING     new replicas within the surge; an old one leaves for each new one that serves
    BLUE_GREEN  all new replicas beside the old ones, without traffic; then all traffic at once
    CANARY      steps: so many percent of the requests to so many new replicas; then as ROLLING

A start of the new revision that fails counts; FAILURES_MAX of them, or no progress within the deadline,
end the rollout: back to the stable revision, or held where it is if the policy says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dure.manager.model import CanaryStep, EndpointView, RolloutPolicy, RolloutState, Strategy

FAILURES_MAX = 3


@dataclass(frozen=True)
class Targets:
    """How many replicas of the wanted revision (`new`) and of others (`old`) there shall be.

    At most `total` together. Where `keep_old` is set, old ones that died are replaced by their like, and
    those that do not serve yet are given time; else they leave at once.
    """

    new: int
    old: int
    total: int
    keep_old: bool = False


def begin(endpoint: EndpointView, now_ms: int) -> RolloutState | None:
    """The state of the rollout that goes on, a fresh one if it has none yet; None without a rollout."""
    if endpoint.stable in (0, endpoint.revision) or endpoint.desired == 0 or endpoint.deleting:
        return None
    state = endpoint.rollout
    if state is None or state.revision != endpoint.revision:
        return RolloutState(endpoint.revision, progress_ms=now_ms)
    return state


def advance(
    state: RolloutState, policy: RolloutPolicy, desired: int, serving: int, published: bool, now_ms: int
) -> RolloutState:
    """The state after a look at how many new replicas serve; `published` if all proxies know of them."""
    if serving > state.most_serving:
        state = replace(state, most_serving=serving, progress_ms=now_ms)
    if state.paused or not _in_steps(state, policy):
        return state
    enough = serving >= _canary_replicas(_weight(state, policy), desired)
    if policy.strategy is Strategy.BLUE_GREEN:
        enough = serving >= desired
    if not enough or not published:
        return replace(state, met_ms=0)
    state = state if state.met_ms else replace(state, met_ms=now_ms, progress_ms=now_ms)
    if policy.strategy is Strategy.BLUE_GREEN:
        return _next_step(state, now_ms) if state.full or not policy.manual_switch else state
    hold_ms = policy.steps[state.step].hold_ms
    if hold_ms is None or now_ms - state.met_ms < hold_ms:
        return state
    return _next_step(state, now_ms)


def resume(state: RolloutState, policy: RolloutPolicy, now_ms: int, *, full: bool) -> RolloutState:
    """What ResumeRollout does: ends a pause, or takes the step that waits; `full` skips all steps."""
    if state.paused:
        state = replace(state, paused=False, failures=0, failed_ms=0, reason="", progress_ms=now_ms)
    elif waits(state, policy):
        state = _next_step(state, now_ms)
    return replace(state, full=True, progress_ms=now_ms) if full else state


def waits(state: RolloutState, policy: RolloutPolicy) -> bool:
    """Whether its step is done and the next one is somebody's to take."""
    if state.paused or not state.met_ms or not _in_steps(state, policy):
        return False
    if policy.strategy is Strategy.BLUE_GREEN:
        return policy.manual_switch and not state.full
    return policy.steps[state.step].hold_ms is None


def failure(state: RolloutState, policy: RolloutPolicy, now_ms: int) -> str:
    """Why it has failed, empty if it has not."""
    if state.paused:
        return ""
    if state.failures >= FAILURES_MAX:
        return f"its replicas do not come up: {state.reason}"
    if not state.met_ms and now_ms - state.progress_ms >= policy.deadline_ms:
        return f"no progress for {policy.deadline_ms / 1000:g} s" + (
            f": {state.reason}" if state.reason else ""
        )
    return ""


def look_again_ms(state: RolloutState, policy: RolloutPolicy) -> int | None:
    """When the clock alone may change something."""
    if state.paused:
        return None
    if not state.met_ms:
        return state.progress_ms + policy.deadline_ms
    if policy.strategy is Strategy.CANARY and _in_steps(state, policy):
        hold_ms = policy.steps[state.step].hold_ms
        return None if hold_ms is None else state.met_ms + hold_ms
    return None


def targets(
    state: RolloutState | None, policy: RolloutPolicy, desired: int, new: int, serving: int, old: int
) -> Targets:
    """For `new` replicas of the wanted revision, of which `serving` take requests, and `old` others."""
    surge, unavailable = amounts(policy, desired)
    if state is None:
        return Targets(desired, max(0, desired - serving), desired + max(1, surge))
    if state.paused:
        building = policy.strategy is Strategy.BLUE_GREEN and _in_steps(state, policy)
        held, total = min(new, desired), 2 * desired if building else desired + max(1, surge)
        least = max(0, desired - unavailable - serving)
        return Targets(held, max(least, min(old, total - held)), total, keep_old=True)
    if _in_steps(state, policy):
        if policy.strategy is Strategy.BLUE_GREEN:
            return Targets(desired, desired, 2 * desired, keep_old=True)
        count = _canary_replicas(_weight(state, policy), desired)
        return Targets(count, max(1, desired - min(serving, count)), desired + max(1, surge), keep_old=True)
    return Targets(desired, max(0, desired - unavailable - serving), desired + surge)


def amounts(policy: RolloutPolicy, desired: int) -> tuple[int, int]:
    """Surge (a percentage is rounded up) and unavailable (rounded down), in replicas; not both zero.

    Where new replicas may stand beside the old ones, the last one that serves never leaves before.
    """
    surge, unavailable = _amount(policy.max_surge, desired, up=True), _amount(policy.max_unavailable, desired)
    if surge:
        unavailable = max(0, min(unavailable, desired - 1))
    return (surge, unavailable) if surge or unavailable else (1, 0)


def pools(
    state: RolloutState | None, policy: RolloutPolicy, serving: Mapping[int, int], desired: int
) -> dict[int, int]:
    """Percent of the requests by revision; empty: all replicas alike. `serving` counts those in the route."""
    if state is None or policy.strategy is Strategy.ROLLING:
        return {}
    share = weight(state, policy, serving, desired)
    others = [revision for revision in sorted(serving) if revision != state.revision]
    if not others:
        return {}
    # What is left is split over the old revisions by their replicas: almost always there is one.
    total = sum(serving[revision] for revision in others)
    split = {revision: max(1, (100 - share) * serving[revision] // total) for revision in others}
    if share == 100:
        split = dict.fromkeys(others, 0)
    elif len(others) == 1:
        split = {others[0]: 100 - share}
    return {**split, state.revision: share}


def pools_back(
    policy: RolloutPolicy, serving: Mapping[int, int], wanted: int, desired: int
) -> dict[int, int]:
    """Percent of the requests by revision while a canary's stable revision takes everything back.

    A canary that was given up gets no more than its step gave it, though the stable revision still lacks
    replicas. Empty: all replicas alike, as for other strategies, and beyond the steps.
    """
    others = {revision: count for revision, count in serving.items() if revision != wanted}
    count = sum(others.values())
    weights = [step.weight for step in policy.steps if _canary_replicas(step.weight, desired) >= count]
    if policy.strategy is not Strategy.CANARY or not (count and weights and serving.get(wanted)):
        return {}
    share = min(*weights, 100 * count // sum(serving.values()))
    return {wanted: 100 - share} | {revision: share * n // count for revision, n in others.items()}


def weight(state: RolloutState, policy: RolloutPolicy, serving: Mapping[int, int], desired: int) -> int:
    """Percent of the requests that the new revision gets."""
    new, total = serving.get(state.revision, 0), sum(serving.values())
    by_number = 100 * new // total if total else 0
    if policy.strategy is Strategy.BLUE_GREEN:
        return 0 if _in_steps(state, policy) else 100
    if policy.strategy is Strategy.CANARY:
        asked = _weight(state, policy)
        if not _in_steps(state, policy):
            return max(by_number, asked)
        # Until all replicas of a step serve, those that do get no more than their part.
        count = _canary_replicas(asked, desired)
        return min(asked, max(1, asked * new // count)) if new else asked
    return by_number


def detail(
    state: RolloutState, policy: RolloutPolicy, name: str, serving: Mapping[int, int], desired: int
) -> str:
    """Where it stands, for people."""
    new = serving.get(state.revision, 0)
    parts = f"revision {state.revision}: {new} of {desired} replica(s) serve"
    if state.paused:
        why = f" ({state.reason})" if state.reason else ""
        return f"{parts}; paused{why}: dure endpoint rollout resume {name}"
    if not _in_steps(state, policy):
        return parts
    onwards = f": dure endpoint rollout resume {name}" if waits(state, policy) else ""
    if policy.strategy is Strategy.BLUE_GREEN:
        return f"{parts}, without traffic yet" + (f"; waits to be switched{onwards}" if onwards else "")
    count = len(policy.steps)
    step = f"step {state.step + 1} of {count}, {_weight(state, policy)}% of the requests"
    return f"{parts}; {step}" + (f"; waits{onwards}" if onwards else "")


def canary_step(state: RolloutState, policy: RolloutPolicy) -> int:
    """Number of the step from 1, 0 outside of steps."""
    return state.step + 1 if policy.strategy is Strategy.CANARY and _in_steps(state, policy) else 0


def _in_steps(state: RolloutState, policy: RolloutPolicy) -> bool:
    """Whether the rollout is still held back by its strategy. Nothing skips the building of the new side."""
    if policy.strategy is Strategy.BLUE_GREEN:
        return state.step == 0
    return policy.strategy is Strategy.CANARY and not state.full and state.step < len(policy.steps)


def _next_step(state: RolloutState, now_ms: int) -> RolloutState:
    return replace(state, step=state.step + 1, met_ms=0, progress_ms=now_ms)


def _weight(state: RolloutState, policy: RolloutPolicy) -> int:
    return policy.steps[min(state.step, len(policy.steps) - 1)].weight


def _canary_replicas(percent: int, desired: int) -> int:
    return max(1, -(-desired * percent // 100))


def _amount(value: str, desired: int, *, up: bool = False) -> int:
    if not value.endswith("%"):
        return int(value)
    hundredths = desired * int(value[:-1])
    return -(-hundredths // 100) if up else hundredths // 100


def store_state(state: RolloutState | None) -> dict[str, Any]:
    return asdict(state) if state is not None else {}


def load_state(stored: Mapping[str, Any]) -> RolloutState | None:
    return RolloutState(**stored) if stored else None


def load_policy(stored: Mapping[str, Any]) -> RolloutPolicy:
    """From the JSON form of the public API's RolloutPolicy; what it leaves out has its default."""
    default = RolloutPolicy()
    strategy = str(stored.get("strategy", "")).removeprefix("ROLLOUT_STRATEGY_")
    steps = tuple(
        CanaryStep(int(step["weight"]), _milliseconds(step["hold"]) if "hold" in step else None)
        for step in stored.get("steps", ())
    )
    return RolloutPolicy(
        strategy=Strategy(strategy) if strategy and strategy != "UNSPECIFIED" else default.strategy,
        max_surge=stored.get("max_surge") or default.max_surge,
        max_unavailable=stored.get("max_unavailable") or default.max_unavailable,
        deadline_ms=_milliseconds(stored["progress_deadline"])
        if "progress_deadline" in stored
        else default.deadline_ms,
        steps=steps or default.steps,
        manual_switch=bool(stored.get("manual_switch", False)),
        automatic_rollback=not stored.get("no_automatic_rollback", False),
    )


def _milliseconds(duration: str) -> int:
    """Of a duration in the JSON form of protobuf: `1.5s`."""
    return round(float(duration.removesuffix("s")) * 1000)
