"""ScalingService: rules, what they see and decided, and what is measured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import grpc.aio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import auth, checks, messages, schema, scope, views
from dure.manager.autoscaler import Autoscaler, rule_of
from dure.manager.model import KernelPhase
from dure.manager.scaling_rules import UPDATABLE, checked, merged, shown_rule
from dure.manager.store import Store, new_uid, now_ms
from dure.scaling.decide import ordered
from dure.scaling.values import Source
from dure.v1 import scaling_pb2, scaling_pb2_grpc
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire import errors, names
from dure.wire.errors import Violation

Context = grpc.aio.ServicerContext[Any, Any]

RULES_MAX = 50
DECISIONS_SHOWN, DECISIONS_SHOWN_MAX = 20, 200
METRICS_SHOWN_MAX = 1_000
ENDPOINTS_MEASURED_MAX = 1_000


class ScalingApi(scaling_pb2_grpc.ScalingServiceServicer):
    """What users call to have replicas come and go by themselves."""

    def __init__(self, store: Store, autoscaler: Autoscaler) -> None:
        self._store = store
        self._autoscaler = autoscaler

    async def CreateScalingRule(
        self, request: scaling_pb2.CreateScalingRuleRequest, context: Context
    ) -> scaling_pb2.CreateScalingRuleResponse:
        async with self._store.write() as tx:
            project, endpoint = await scope.endpoint(tx.session, request.parent, "parent")
            if endpoint.deleting:
                raise errors.FailedPrecondition(f"endpoint `{endpoint.name}` is being deleted")
            taken = list(
                await tx.session.scalars(
                    select(schema.ScalingRule.name).where(schema.ScalingRule.endpoint_uid == endpoint.uid)
                )
            )
            if len(taken) >= RULES_MAX:
                raise errors.ResourceExhausted(f"endpoint `{endpoint.name}` has {RULES_MAX} rules already")
            name = request.rule_id or _free_name(taken)
            violations: list[Violation] = []
            wrong = names.check_id(name, names.ENDPOINT_ID, "rule_id")
            violations += [wrong] if wrong is not None else []
            fields = checked(request.rule, violations)
            if violations:
                raise errors.InvalidInput.of(violations)
            if name in taken:
                raise errors.AlreadyExists(
                    f"endpoint `{endpoint.name}` has a rule `{name}` already; change it with "
                    f"`dure rule update {endpoint.name} {name}`",
                    reason="RULE_EXISTS",
                )
            row = schema.ScalingRule(
                uid=new_uid(), endpoint_uid=endpoint.uid, name=name, created_ms=now_ms(), fired_ms=0, **fields
            )
            tx.session.add(row)
            auth.note(f"rule {name}")
            tx.event(endpoint.uid, "RULE_CREATED", f"scaling rule {name} was added")
            tx.touch("endpoint", endpoint.uid)
            await tx.session.flush()
            rule = shown_rule(row, project.name, endpoint.name)
        return scaling_pb2.CreateScalingRuleResponse(rule=rule, warnings=self._warnings(endpoint, rule))

    async def GetScalingRule(
        self, request: scaling_pb2.GetScalingRuleRequest, context: Context
    ) -> scaling_pb2.GetScalingRuleResponse:
        async with self._store.read() as session:
            project, endpoint, row = await _find(session, request.name)
        return scaling_pb2.GetScalingRuleResponse(rule=shown_rule(row, project.name, endpoint.name))

    async def ListScalingRules(
        self, request: scaling_pb2.ListScalingRulesRequest, context: Context
    ) -> scaling_pb2.ListScalingRulesResponse:
        size, after = scope.page_size(request.page_size), scope.read_page_token(request.page_token)
        async with self._store.read() as session:
            project, endpoint = await scope.endpoint(session, request.parent, "parent")
            rows = list(
                await session.scalars(
                    select(schema.ScalingRule)
                    .where(schema.ScalingRule.endpoint_uid == endpoint.uid, schema.ScalingRule.uid > after)
                    .order_by(schema.ScalingRule.uid)
                    .limit(size + 1)
                )
            )
        rows, token = scope.page(rows, size, [row.uid for row in rows])
        rules = [shown_rule(row, project.name, endpoint.name) for row in rows]
        return scaling_pb2.ListScalingRulesResponse(rules=rules, next_page_token=token)

    async def UpdateScalingRule(
        self, request: scaling_pb2.UpdateScalingRuleRequest, context: Context
    ) -> scaling_pb2.UpdateScalingRuleResponse:
        paths = list(request.update_mask.paths)
        violations = checks.mask(paths, UPDATABLE)
        if violations:
            raise errors.InvalidInput.of(violations)
        async with self._store.write() as tx:
            project, endpoint, row = await _find(tx.session, request.rule.name, "rule.name")
            before = shown_rule(row, project.name, endpoint.name)
            fields = checked(merged(before, request.rule, paths), violations)
            if violations:
                raise errors.InvalidInput.of(violations)
            for field, value in fields.items():
                setattr(row, field, value)
            auth.note(f"rule {row.name}: {', '.join(paths)}")
            tx.event(endpoint.uid, "RULE_UPDATED", f"scaling rule {row.name}: {', '.join(paths)} changed")
            tx.touch("endpoint", endpoint.uid)
            rule = shown_rule(row, project.name, endpoint.name)
        return scaling_pb2.UpdateScalingRuleResponse(rule=rule, warnings=self._warnings(endpoint, rule))

    async def DeleteScalingRule(
        self, request: scaling_pb2.DeleteScalingRuleRequest, context: Context
    ) -> scaling_pb2.DeleteScalingRuleResponse:
        async with self._store.write() as tx:
            _, endpoint, row = await _find(tx.session, request.name)
            await tx.session.delete(row)
            auth.note(f"rule {row.name}")
            tx.event(endpoint.uid, "RULE_DELETED", f"scaling rule {row.name} was removed")
            tx.touch("endpoint", endpoint.uid)
        return scaling_pb2.DeleteScalingRuleResponse()

    async def ExplainScaling(
        self, request: scaling_pb2.ExplainScalingRequest, context: Context
    ) -> scaling_pb2.ExplainScalingResponse:
        limit = request.decisions_max or DECISIONS_SHOWN
        if not 0 < limit <= DECISIONS_SHOWN_MAX:
            wrong = Violation("decisions_max", f"must be from 0 to {DECISIONS_SHOWN_MAX}")
            raise errors.InvalidInput.of([wrong])
        async with self._store.read() as session:
            _, endpoint = await scope.endpoint(session, request.name)
            rules = list(
                await session.scalars(
                    select(schema.ScalingRule)
                    .where(schema.ScalingRule.endpoint_uid == endpoint.uid)
                    .order_by(schema.ScalingRule.uid)
                )
            )
            rows = await session.scalars(
                select(schema.ScalingDecision)
                .where(schema.ScalingDecision.endpoint_uid == endpoint.uid)
                .order_by(schema.ScalingDecision.uid.desc())
                .limit(limit)
            )
            response = scaling_pb2.ExplainScalingResponse(decisions=[_decision(row) for row in rows])
        newest = self._autoscaler.newest.get(endpoint.uid)
        if newest is not None:
            response.newest.time.CopyFrom(messages.timestamp(newest.at_ms))
            response.newest.from_replicas = newest.before
            response.newest.to_replicas = newest.decision.desired
            response.newest.cause = newest.decision.cause
            response.newest.reason = newest.decision.reason
            for verdict in newest.decision.verdicts:
                response.newest.verdicts.add(
                    rule=verdict.rule,
                    fired=verdict.fired,
                    value="" if verdict.value is None else f"{verdict.value:g}",
                    reason=verdict.reason,
                )
        response.metrics.extend(self._metrics(endpoint.uid))
        response.summary = _summary(endpoint, rules, response)
        return response

    async def GetMeasurements(
        self, request: scaling_pb2.GetMeasurementsRequest, context: Context
    ) -> scaling_pb2.GetMeasurementsResponse:
        measures = self._autoscaler.measures
        response = scaling_pb2.GetMeasurementsResponse()
        async with self._store.read() as session:
            project = await scope.project(session, request.parent)
            rows = list(
                await session.scalars(
                    select(schema.Endpoint)
                    .where(
                        schema.Endpoint.project_uid == project.uid,
                        schema.Endpoint.living_name.is_not(None),
                    )
                    .order_by(schema.Endpoint.living_name)
                    .limit(ENDPOINTS_MEASURED_MAX)
                )
            )
            kernels = await session.execute(
                select(schema.Kernel.uid, schema.Kernel.endpoint_uid, schema.Kernel.agent_uid).where(
                    schema.Kernel.phase != KernelPhase.GONE
                )
            )
            by_agent: dict[str, list[tuple[str, str]]] = {}
            for uid, endpoint_uid, agent_uid in kernels:
                by_agent.setdefault(agent_uid, []).append((uid, endpoint_uid))
            agents = await views.agent_names(session, by_agent)
        for row in rows:
            one = response.endpoints.add(endpoint=names.endpoint(project.name, row.name))
            traffic = measures.traffic(row.uid)
            if traffic is not None:
                one.requests_per_second, one.concurrency, one.queue = (
                    traffic.rps,
                    traffic.concurrency,
                    traffic.queue,
                )
                one.latency_p50_ms = traffic.latency.quantile(0.5) or 0.0
                one.latency_p95_ms = traffic.latency.quantile(0.95) or 0.0
                one.error_rate = traffic.errors_per_second / traffic.rps if traffic.rps else 0.0
            if len(rows) == 1:
                one.metrics.extend(self._metrics(row.uid))
        for agent_uid, name in sorted(agents.items(), key=lambda item: item[1]):
            usage: dict[str, float] = {}
            for uid, endpoint_uid in by_agent[agent_uid]:
                for metric, value in measures.kernel_usage([uid], endpoint_uid).items():
                    usage[metric] = usage.get(metric, 0.0) + value
            response.nodes.add(
                agent=names.agent(name),
                cpu_used=usage.get("cpu_used", 0.0),
                mem=usage.get("mem", 0.0),
                cuda_mem=usage.get("cuda_mem", 0.0),
            )
        return response

    def _metrics(self, endpoint_uid: str) -> Iterable[scaling_pb2.Metric]:
        known = self._autoscaler.measures.known(endpoint_uid)
        for source, name, value, age_ms in known[:METRICS_SHOWN_MAX]:
            metric = scaling_pb2.Metric(source=_SOURCES[source], name=name, value=value)
            metric.age.FromMilliseconds(age_ms)
            yield metric

    def _warnings(self, endpoint: schema.Endpoint, rule: ScalingRule) -> list[str]:
        """What looks wrong with a rule, though it may become right."""
        source = next(key for key, value in _SOURCES.items() if value == rule.metric_source)
        known = sorted(
            name for found, name, _, _ in self._autoscaler.measures.known(endpoint.uid) if found is source
        )
        if rule.metric_name in known or source is not Source.INFERENCE_FRAMEWORK:
            return []
        if not known:
            errors_of = self._autoscaler.measures.scrape_errors(endpoint.uid)
            why = f": {next(iter(errors_of.values()))}" if errors_of else " yet"
            return [f"no replica has shown a metric at {endpoint.metrics_path}{why}"]
        near = difflib.get_close_matches(rule.metric_name, known, n=5, cutoff=0.4) or known[:10]
        return [
            f"no replica has ever shown `{rule.metric_name}`; among the {len(known)} that are shown: "
            f"{', '.join(near)}"
        ]


async def _find(
    session: AsyncSession, name: str, field: str = "name"
) -> tuple[schema.Project, schema.Endpoint, schema.ScalingRule]:
    project_id, endpoint_id, rule_id = names.parse(name, "projects/{}/endpoints/{}/rules/{}", field)
    project, endpoint = await scope.endpoint(session, names.endpoint(project_id, endpoint_id))
    row = await session.scalar(
        select(schema.ScalingRule).where(
            schema.ScalingRule.endpoint_uid == endpoint.uid, schema.ScalingRule.name == rule_id
        )
    )
    if row is None:
        raise errors.NotFound(
            f"endpoint `{endpoint.name}` has no rule `{rule_id}`; see: dure rule list {endpoint.name}",
            reason="RULE_NOT_FOUND",
        )
    return project, endpoint, row


def _free_name(taken: list[str]) -> str:
    return next(name for number in range(1, len(taken) + 2) if (name := f"rule-{number}") not in taken)


def _decision(row: schema.ScalingDecision) -> scaling_pb2.ScalingDecision:
    message = scaling_pb2.ScalingDecision(
        time=messages.timestamp(row.time_ms),
        from_replicas=row.from_replicas,
        to_replicas=row.to_replicas,
        cause=row.cause,
        reason=row.reason,
    )
    for verdict in row.verdicts:
        value = verdict["value"]
        message.verdicts.add(
            rule=verdict["rule"],
            fired=verdict["fired"],
            value="" if value is None else f"{value:g}",
            reason=verdict["reason"],
        )
    return message


def _summary(
    endpoint: schema.Endpoint, rules: list[schema.ScalingRule], found: scaling_pb2.ExplainScalingResponse
) -> str:
    if not rules and not endpoint.scale_to_zero_ms:
        return (
            f"endpoint {endpoint.name} has no scaling rules: {endpoint.desired_replicas} replica(s), as its "
            "user wants"
        )
    state = f"endpoint {endpoint.name}: {endpoint.desired_replicas} replica(s) now"
    if endpoint.desired_replicas != endpoint.replica_count:
        state += f" ({endpoint.replica_count} asked for)"
    order = " then ".join(rule.name for rule in ordered([rule_of(row) for row in rules]))
    state += f"; rules are looked at in the order {order}" if order else ""
    if endpoint.blocked:
        return f"{state}; nothing is scaled while the endpoint is BLOCKED"
    if endpoint.desired_replicas == 0 and not endpoint.idle:
        return f"{state}; nothing is scaled while its user wants zero replicas"
    return f"{state}; {found.newest.reason or 'not looked at yet: nothing was measured'}"


_SOURCES = {
    Source.INFERENCE_FRAMEWORK: scaling_pb2.METRIC_SOURCE_INFERENCE_FRAMEWORK,
    Source.KERNEL: scaling_pb2.METRIC_SOURCE_KERNEL,
    Source.PROXY: scaling_pb2.METRIC_SOURCE_PROXY,
}
