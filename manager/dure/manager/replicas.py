"""What becomes of an endpoint's replicas: the reconciler, a function of stored state and the clock.

`reconcile` compares what an endpoint wants with the replicas that it has and returns a Plan: replicas to
create, to move to another status, to drain, to stop, how a rollout goes on or that it is rolled back, and
when to look again. The controller applies it.

Losing an agent changes no replica's status: its sessions most likely still serve. Only when the agent
was given up on are replacements started, and only when those are healthy, or LOST_KEEP_MS have passed,
do the old ones leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dure.manager import rollout
from dure.manager.model import (
    EndpointStatus,
    EndpointView,
    KernelHealth,
    KernelPhase,
    ReplicaStatus,
    ReplicaView,
    RolloutState,
    Surroundings,
)
from dure.manager.plan import MOVES, IllegalMove, Move, Plan
from dure.manager.serving import in_route, serving_by_revision
from dure.manager.standing import standing

S = ReplicaStatus

FAILURES_MAX = 5
# Replicas that served and then died never wait longer than this many failures make: 8 s.
SERVED_FAILURES_MAX = 4
# A replica that was healthy for this long ends a series of failures.
STABLE_MS = 10_000
# One that its node ended was healthy just before: only this long ends a series of those.
PROVEN_MS = 600_000
UNHEALTHY_GRACE_MS = 60_000
# The same for a new revision's replica that never was healthy: the old revision still serves.
ROLLOUT_GRACE_MS = 20_000
DRAIN_GRACE_MS = 30_000
# How long replicas of an agent that was given up on stay in the route without a replacement.
LOST_KEEP_MS = 60_000
# Replicas are made in steps, so that no transaction grows without bound.
CREATE_MAX = 50
ERROR_CHARS_MAX = 2_000
# Exits that say nothing about the replica's own command. One that used more than its share, whose image
# cannot be had, or for which less is enforced than it requires, ended by what it asked for: that counts.
_INFRASTRUCTURE = frozenset({"NODE_REBOOTED", "LOST", "DEVICE_LOST"})
# Ends by the node, which the next replica meets as surely once it has served for a while.
_EVICTIONS = frozenset({"GPU_MEMORY_EXCEEDED", "ENFORCEMENT_FAILED"})


def status_of(replica: ReplicaView) -> ReplicaStatus:
    """Where a replica that is not leaving stands, by its kernels alone."""
    if not replica.kernels:
        return S.PENDING
    if any(kernel.phase in (KernelPhase.EXITED, KernelPhase.GONE) for kernel in replica.kernels):
        return S.FAILED
    if any(kernel.phase is not KernelPhase.RUNNING for kernel in replica.kernels):
        # Once it ran, a kernel that says otherwise for a moment (an agent that adopts it) is no news.
        return S.STARTING if replica.status in (S.PENDING, S.STARTING) else replica.status
    return {
        KernelHealth.UNKNOWN: S.DEGRADED,
        KernelHealth.DEGRADED: S.DEGRADED,
        KernelHealth.HEALTHY: S.HEALTHY,
        KernelHealth.UNHEALTHY: S.UNHEALTHY,
    }[replica.kernels[0].health]


def reconcile(endpoint: EndpointView, replicas: Sequence[ReplicaView], around: Surroundings) -> Plan:
    """The whole decision. `replicas` are all that have not ended, oldest first."""
    plan = Plan(failures=endpoint.failures, failed_ms=endpoint.failed_ms, blocked=endpoint.blocked)
    plan.evictions, plan.evicted_ms = endpoint.evictions, endpoint.evicted_ms
    plan.last_error, plan.stable = endpoint.last_error, endpoint.stable
    plan.rollout = rollout.begin(endpoint, around.now_ms)
    current = {replica.uid: replica for replica in replicas if replica.living}
    if endpoint.rollout is None and all(_is_new(endpoint, r) for r in current.values() if not r.leaving):
        # Nothing is there that it could replace with care.
        plan.rollout = None
    _observe(endpoint, current, around, plan)
    _advance(endpoint, current, around, plan)
    if plan.rollback:
        # The next look is at an endpoint that wants its stable revision again.
        plan.status, plan.reason = EndpointStatus.UPDATING, plan.rollback
        plan.look_at(around.now_ms)
        return plan
    _retire(endpoint, current, around, plan)
    _leave(current, around, plan)
    if endpoint.deleting:
        plan.gone = not current and not around.lingering
    else:
        _grow(endpoint, current, around, plan)
    plan.status, plan.reason = standing(endpoint, list(current.values()), around, plan)
    return plan


def _advance(
    endpoint: EndpointView, current: dict[str, ReplicaView], around: Surroundings, plan: Plan
) -> None:
    """Takes a rollout one step on, ends it, or gives it up."""
    staying = [replica for replica in current.values() if not replica.leaving]
    serving = serving_by_revision(staying).get(endpoint.revision, 0)
    if plan.rollout is None:
        if serving >= endpoint.desired > 0 and not endpoint.deleting:
            plan.stable = endpoint.revision
        return
    policy = endpoint.policy
    plan.rollout = rollout.advance(
        plan.rollout, policy, endpoint.desired, serving, around.published, around.now_ms
    )
    why = rollout.failure(plan.rollout, policy, around.now_ms)
    if why and policy.automatic_rollback:
        plan.rollback, plan.rollout = why, None
    elif why:
        plan.rollout = replace(plan.rollout, paused=True, reason=why)
    elif serving >= endpoint.desired and all(
        replica.revision == endpoint.revision for replica in current.values()
    ):
        plan.stable, plan.rollout = endpoint.revision, None
    elif (at_ms := rollout.look_again_ms(plan.rollout, policy)) is not None:
        plan.look_at(at_ms)


def _move(plan: Plan, current: dict[str, ReplicaView], move: Move) -> None:
    replica = current[move.uid]
    if move.status is not replica.status and move.status not in MOVES[replica.status]:
        raise IllegalMove(f"{replica.uid}: {replica.status} -> {move.status} ({move.reason})")
    plan.moves.append(move)
    if move.status in (S.TERMINATED, S.FAILED):
        del current[move.uid]
    else:
        current[move.uid] = replace(
            replica,
            status=move.status,
            was_healthy=replica.was_healthy or move.status is S.HEALTHY,
            draining=replica.draining or move.drain,
            reason=move.reason,
        )


def _observe(
    endpoint: EndpointView, current: dict[str, ReplicaView], around: Surroundings, plan: Plan
) -> None:
    """Takes over what agents report of replicas that are not leaving."""
    for replica in list(current.values()):
        if replica.leaving:
            continue
        status = status_of(replica)
        if status is S.FAILED:
            _fail_by_exit(endpoint, current, replica, around, plan)
        elif status is not replica.status:
            reason = next((kernel.message for kernel in replica.kernels if kernel.message), "")
            _move(plan, current, _observed_move(replica, status, reason))
            if status is S.HEALTHY and not plan.evictions:
                plan.clear_errors = True
        # A success that came after the last failure and held ends the series. One from before says
        # nothing: a replica may serve for days while its neighbour cannot start.
        if status is S.HEALTHY and plan.failures and replica.healthy_since_ms > plan.failed_ms:
            healthy_ms = around.now_ms - replica.healthy_since_ms
            if healthy_ms >= STABLE_MS:
                plan.failures, plan.failed_ms = 0, 0
            else:
                plan.look_at(around.now_ms + STABLE_MS - healthy_ms)
        if status is S.HEALTHY and plan.evictions and replica.healthy_since_ms > plan.evicted_ms:
            if around.now_ms - replica.healthy_since_ms >= PROVEN_MS:
                plan.evictions, plan.evicted_ms, plan.clear_errors = 0, 0, True
            else:
                plan.look_at(replica.healthy_since_ms + PROVEN_MS)
        if status is S.UNHEALTHY:
            since_ms = replica.since_ms if replica.status is S.UNHEALTHY else around.now_ms
            grace_ms = _unhealthy_grace_ms(endpoint, replica, plan)
            if around.now_ms - since_ms >= grace_ms:
                why = current[replica.uid].reason
                reason = (
                    f"unhealthy for {grace_ms // 1000} s" + (f" ({why})" if why else "") + "; it is replaced"
                )
                _fail(endpoint, current, replica, around, plan, reason, counts=not replica.was_healthy)
            else:
                plan.look_at(since_ms + grace_ms)


def _observed_move(replica: ReplicaView, status: ReplicaStatus, reason: str) -> Move:
    events = {
        S.HEALTHY: ("REPLICA_HEALTHY", "answers its health check and takes traffic", False),
        S.UNHEALTHY: ("REPLICA_UNHEALTHY", "failed its health check too often and takes no traffic", True),
        S.DEGRADED: ("REPLICA_STARTED", "its command runs; waiting for its health check", False),
    }
    event, sentence, warning = events.get(status, ("", "", False))
    return Move(replica.uid, status, reason or ("" if status is S.HEALTHY else sentence), event, warning)


def _fail_by_exit(
    endpoint: EndpointView,
    current: dict[str, ReplicaView],
    replica: ReplicaView,
    around: Surroundings,
    plan: Plan,
) -> None:
    exited = next((kernel for kernel in replica.kernels if kernel.exit is not None), None)
    ended = exited.exit if exited is not None else None
    if exited is None or ended is None:
        reason, infrastructure, evicted = "its agent no longer has it", True, False
    else:
        reason = ended.message or f"ended with {ended.reason} (exit code {ended.code})"
        if ended.log_tail.strip():
            last = " | ".join(line for line in ended.log_tail.strip().splitlines()[-5:] if line.strip())
            reason += f"; last log lines: {last[:600]}"
        if len(replica.kernels) > 1:
            reason = f"kernel {exited.name} on {exited.agent_name}: {reason}"
        infrastructure = ended.reason in _INFRASTRUCTURE
        evicted = ended.reason in _EVICTIONS and not _healthy_for(replica, around, PROVEN_MS)
    # One that served and then died is replaced; only those that never came up, or were ended by their node,
    # lead to BLOCKED.
    counts = not infrastructure and (evicted or not replica.was_healthy)
    quiet = infrastructure
    _fail(endpoint, current, replica, around, plan, reason, counts=counts, quiet=quiet, evicted=evicted)


def _fail(
    endpoint: EndpointView,
    current: dict[str, ReplicaView],
    replica: ReplicaView,
    around: Surroundings,
    plan: Plan,
    reason: str,
    *,
    counts: bool,
    quiet: bool = False,
    evicted: bool = False,
) -> None:
    stable = _healthy_for(replica, around, STABLE_MS)
    _move(plan, current, Move(replica.uid, S.FAILED, reason, "REPLICA_FAILED", warning=True, stop=True))
    if quiet or endpoint.deleting:
        return
    if plan.rollout is not None and _is_new(endpoint, replica):
        hopeless = replica.status is S.UNHEALTHY and not replica.was_healthy
        plan.rollout = _count_failure(plan.rollout, replica, reason, around.now_ms, hopeless=hopeless)
    # What dies together counts once: only the death of one that was started after the last one that counted
    # says that starting again is of no use yet. One that had served for a while is replaced at once.
    if not stable and replica.created_ms > plan.failed_ms:
        most = SERVED_FAILURES_MAX if replica.was_healthy else plan.failures + 1
        plan.failures = max(plan.failures, min(plan.failures + 1, most))
        plan.failed_ms = around.now_ms
    if evicted and replica.created_ms > plan.evicted_ms:
        plan.evictions, plan.evicted_ms = plan.evictions + 1, around.now_ms
    where = f" on {replica.kernels[0].agent_name}" if replica.kernels else ""
    plan.last_error = f"replica {replica.uid[-6:]}{where}: {reason}"[:ERROR_CHARS_MAX]
    if counts:
        plan.errors.append(plan.last_error)
        # Five starts in a row, not five replicas of one start; a success would have cleared the errors.
        stored = 0 if plan.clear_errors else len(endpoint.errors)
        if plan.failures >= FAILURES_MAX and stored + len(plan.errors) >= FAILURES_MAX:
            plan.blocked = plan.rollout is None
        if plan.evictions >= FAILURES_MAX:
            plan.blocked = plan.rollout is None


def _healthy_for(replica: ReplicaView, around: Surroundings, ms: int) -> bool:
    return replica.was_healthy and around.now_ms - replica.healthy_since_ms >= ms


def _is_new(endpoint: EndpointView, replica: ReplicaView) -> bool:
    return replica.revision == endpoint.revision


def _unhealthy_grace_ms(endpoint: EndpointView, replica: ReplicaView, plan: Plan) -> int:
    unproven = plan.rollout is not None and _is_new(endpoint, replica) and not replica.was_healthy
    return ROLLOUT_GRACE_MS if unproven else UNHEALTHY_GRACE_MS


def _count_failure(
    state: RolloutState, replica: ReplicaView, reason: str, now_ms: int, *, hopeless: bool
) -> RolloutState:
    """As for endpoints, what dies together counts once.

    `hopeless` is one that ran and never answered well: if none of its revision ever did, another start would
    tell nothing new.
    """
    if replica.created_ms <= state.failed_ms:
        return state
    failures = rollout.FAILURES_MAX if hopeless and not state.most_serving else state.failures + 1
    return replace(state, failures=failures, failed_ms=now_ms, reason=reason[:1000])


def _retire(
    endpoint: EndpointView, current: dict[str, ReplicaView], around: Surroundings, plan: Plan
) -> None:
    """Sends away what is too much: scale in, an old revision, the replaced, everything of a deletion."""
    staying = [replica for replica in current.values() if not replica.leaving]
    if endpoint.deleting:
        for replica in staying:
            _terminate(current, replica, plan, "the endpoint is being deleted")
        return
    doomed = [replica for replica in staying if _doomed(replica, around)]
    sound = [replica for replica in staying if replica not in doomed]
    new = [replica for replica in sound if _is_new(endpoint, replica)]
    old = [replica for replica in sound if not _is_new(endpoint, replica)]
    serving_new = sum(1 for replica in new if in_route(replica))
    wanted = rollout.targets(plan.rollout, endpoint.policy, endpoint.desired, len(new), serving_new, len(old))

    for replica in _least_useful_first(new)[: max(0, len(new) - wanted.new)]:
        _terminate(current, replica, plan, "scaled in")
    if wanted.keep_old:
        replaced = _least_useful_first(old)[: max(0, len(old) - wanted.old)]
    else:
        serving_old = _least_useful_first([replica for replica in old if in_route(replica)])
        replaced = [replica for replica in old if not in_route(replica)]
        replaced += serving_old[: max(0, len(serving_old) - wanted.old)]
    for replica in replaced:
        _terminate(current, replica, plan, f"revision {replica.revision} is replaced")

    # Replicas of an agent that was given up on most likely still serve, and those of one that is drained
    # do: they leave one by one as replacements become healthy, or when the lost ones had none for too long.
    serving_sound = sum(1 for replica in current.values() if replica in sound and in_route(replica))
    missing = max(0, endpoint.desired - serving_sound)
    serving_doomed = [replica for replica in _least_useful_first(doomed) if in_route(replica)]
    replaceable = serving_doomed[: max(0, len(serving_doomed) - missing)]
    for replica in doomed:
        node = _left_node(replica, around)
        if not _lost(replica, around):
            if not in_route(replica) or replica in replaceable:
                _terminate(current, replica, plan, f"agent {node} is being drained")
            continue
        away_ms = max(around.lost_ms.get(kernel.agent_uid, 0) for kernel in replica.kernels)
        if not in_route(replica):
            reason = f"agent {node} is lost, and it did not serve"
        elif replica in replaceable:
            reason = f"agent {node} is lost; a replacement serves"
        elif away_ms >= LOST_KEEP_MS:
            reason = f"agent {node} has been lost for {LOST_KEEP_MS // 1000} s"
        else:
            plan.look_at(around.now_ms + LOST_KEEP_MS - away_ms)
            continue
        _move(plan, current, Move(replica.uid, S.FAILED, reason, "REPLICA_LOST", warning=True, stop=True))


def _lost(replica: ReplicaView, around: Surroundings) -> bool:
    return any(kernel.agent_uid in around.given_up for kernel in replica.kernels)


def _doomed(replica: ReplicaView, around: Surroundings) -> bool:
    leave = around.given_up | around.emptying
    return any(kernel.agent_uid in leave for kernel in replica.kernels)


def _left_node(replica: ReplicaView, around: Surroundings) -> str:
    leave = around.given_up | around.emptying
    return next(kernel.agent_name for kernel in replica.kernels if kernel.agent_uid in leave)


_USEFULNESS = {S.PENDING: 0, S.STARTING: 1, S.UNHEALTHY: 2, S.DEGRADED: 3, S.HEALTHY: 4}


def _least_useful_first(replicas: Sequence[ReplicaView]) -> list[ReplicaView]:
    """Pending, starting, unhealthy, degraded, healthy; the newest first within each."""
    # Uids sort by time, too, and tell those of one transaction apart.
    newest_first = sorted(replicas, key=lambda replica: (replica.created_ms, replica.uid), reverse=True)
    return sorted(newest_first, key=lambda replica: _USEFULNESS[replica.status])


def _terminate(current: dict[str, ReplicaView], replica: ReplicaView, plan: Plan, why: str) -> None:
    if not replica.kernels:
        _move(plan, current, Move(replica.uid, S.TERMINATED, why))
        return
    drain = in_route(replica)
    event = "REPLICA_DRAINING" if drain else "REPLICA_STOPPING"
    _move(plan, current, Move(replica.uid, S.TERMINATING, why, event, stop=not drain, drain=drain))


def _leave(current: dict[str, ReplicaView], around: Surroundings, plan: Plan) -> None:
    """Moves on what is being drained and stopped."""
    moved = {move.uid for move in plan.moves}
    for replica in list(current.values()):
        if replica.status is not S.TERMINATING:
            continue
        if replica.uid in moved:
            plan.look_at(around.now_ms + DRAIN_GRACE_MS)
            continue
        if all(kernel.phase is KernelPhase.GONE for kernel in replica.kernels):
            reason = replica.reason or "stopped"
            _move(plan, current, Move(replica.uid, S.TERMINATED, reason, "REPLICA_STOPPED"))
            continue
        if any(kernel.wanted for kernel in replica.kernels):
            ended = any(kernel.phase is KernelPhase.EXITED for kernel in replica.kernels)
            over = around.now_ms - replica.since_ms >= DRAIN_GRACE_MS
            if not replica.draining or ended or over or replica.uid in around.drained:
                plan.stop.append(replica.uid)
            else:
                plan.look_at(replica.since_ms + DRAIN_GRACE_MS)
        elif all(
            kernel.phase is KernelPhase.GONE or kernel.agent_uid in around.given_up
            for kernel in replica.kernels
        ):
            # Its agent will clean up when it is back; the grant is held until then.
            reason = "its agent is lost; whatever is left of it there ends when the agent is back"
            _move(plan, current, Move(replica.uid, S.TERMINATED, reason, "REPLICA_STOPPED", warning=True))


def _grow(endpoint: EndpointView, current: dict[str, ReplicaView], around: Surroundings, plan: Plan) -> None:
    if plan.blocked:
        return
    staying = [replica for replica in current.values() if not replica.leaving]
    sound = [replica for replica in staying if not _doomed(replica, around)]
    new = [replica for replica in sound if _is_new(endpoint, replica)]
    old = len(sound) - len(new)
    serving_new = sum(1 for replica in new if in_route(replica))
    targets = rollout.targets(plan.rollout, endpoint.policy, endpoint.desired, len(new), serving_new, old)
    missing = {endpoint.revision: min(targets.new, targets.total - old) - len(new)}
    if targets.keep_old:
        missing[endpoint.stable] = targets.old - old
    missing = {revision: count for revision, count in missing.items() if count > 0}
    if not missing:
        return
    if around.now_ms < plan.next_start_ms:
        plan.look_at(plan.next_start_ms)
        return
    left = CREATE_MAX
    for revision, count in missing.items():
        plan.create[revision] = min(count, left)
        left -= plan.create[revision]
    if sum(missing.values()) > CREATE_MAX:
        plan.look_at(around.now_ms)
