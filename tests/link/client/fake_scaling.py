"""The fake manager's ScalingService: keeps rules, and says what it was told to say."""

from __future__ import annotations

from typing import Any

from link.client.fake_state import FakeManager, page, refuses

from dure.v1 import scaling_pb2, scaling_pb2_grpc
from dure.v1.scaling_pb2 import ScalingRule
from dure.wire.errors import AlreadyExists, InvalidInput, NotFound, Violation

UP, DOWN = scaling_pb2.SCALING_TYPE_SCALE_UP, scaling_pb2.SCALING_TYPE_SCALE_DOWN
PROXY_METRICS = ("requests_per_second", "concurrency", "queue", "latency:p95")


class Scaling(scaling_pb2_grpc.ScalingServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def rules(self, endpoint: str) -> dict[str, ScalingRule]:
        if endpoint not in self.fake.endpoints:
            raise NotFound(f"there is no endpoint `{endpoint.rsplit('/', 1)[-1]}`")
        return self.fake.rules.setdefault(endpoint, {})

    def find(self, name: str) -> ScalingRule:
        endpoint, _, rule = name.partition("/rules/")
        rules = self.rules(endpoint)
        if rule not in rules:
            raise NotFound(f"there is no rule `{rule}`")
        return rules[rule]

    def stored(self, rule: ScalingRule) -> ScalingRule:
        """Checked, and with its defaults, as the manager answers."""
        kept = ScalingRule()
        kept.CopyFrom(rule)
        down = rule.type == DOWN or rule.step_size < 0
        kept.type, kept.step_size = (DOWN if down else UP), abs(rule.step_size)
        for field, value in (("min_replicas", 0 if down else 1), ("max_replicas", 10), ("enabled", True)):
            if not kept.HasField(field):  # type: ignore[arg-type]
                setattr(kept, field, value)
        if not kept.HasField("cooldown"):
            kept.cooldown.FromSeconds(300)
        kept.window.SetInParent()
        wrong = []
        if kept.min_replicas > kept.max_replicas:
            wrong.append(Violation("rule.min_replicas", "is above max_replicas"))
        if not kept.metric_name:
            wrong.append(Violation("rule.metric_name", "is required"))
        if not kept.threshold:
            wrong.append(Violation("rule.threshold", "is required"))
        if wrong:
            raise InvalidInput.of(wrong)
        return kept

    def warnings(self, rule: ScalingRule) -> list[str]:
        if rule.metric_source == scaling_pb2.METRIC_SOURCE_PROXY and rule.metric_name not in PROXY_METRICS:
            return [f"no metric `{rule.metric_name}` was seen; known: {', '.join(PROXY_METRICS)}"]
        return []

    @refuses
    async def CreateScalingRule(self, request: Any, context: Any) -> scaling_pb2.CreateScalingRuleResponse:
        self.fake.called("CreateScalingRule")
        rules = self.rules(request.parent)
        name = request.rule_id or next(f"rule-{n}" for n in range(1, 999) if f"rule-{n}" not in rules)
        if name in rules:
            raise AlreadyExists(f"a rule `{name}` exists already")
        rule = self.stored(request.rule)
        rule.name, rule.uid = f"{request.parent}/rules/{name}", self.fake.uid()
        rule.create_time.GetCurrentTime()
        rules[name] = rule
        return scaling_pb2.CreateScalingRuleResponse(rule=rule, warnings=self.warnings(rule))

    @refuses
    async def GetScalingRule(self, request: Any, context: Any) -> scaling_pb2.GetScalingRuleResponse:
        return scaling_pb2.GetScalingRuleResponse(rule=self.find(request.name))

    @refuses
    async def ListScalingRules(self, request: Any, context: Any) -> scaling_pb2.ListScalingRulesResponse:
        items, token = page(list(self.rules(request.parent).values()), request, self.fake)
        return scaling_pb2.ListScalingRulesResponse(rules=items, next_page_token=token)

    @refuses
    async def UpdateScalingRule(self, request: Any, context: Any) -> scaling_pb2.UpdateScalingRuleResponse:
        self.fake.called("UpdateScalingRule")
        rule = self.find(request.rule.name)
        changed = ScalingRule()
        changed.CopyFrom(rule)
        for path in request.update_mask.paths:
            only = ScalingRule()
            only.CopyFrom(request.rule)
            for field in only.DESCRIPTOR.fields:
                if field.name != path:
                    only.ClearField(field.name)
            changed.ClearField(path)
            changed.MergeFrom(only)
        rule.CopyFrom(self.stored(changed))
        self.fake.rule_updates.append(list(request.update_mask.paths))
        return scaling_pb2.UpdateScalingRuleResponse(rule=rule, warnings=self.warnings(rule))

    @refuses
    async def DeleteScalingRule(self, request: Any, context: Any) -> scaling_pb2.DeleteScalingRuleResponse:
        self.fake.called("DeleteScalingRule")
        rule = self.find(request.name)
        endpoint, _, name = rule.name.partition("/rules/")
        del self.fake.rules[endpoint][name]
        return scaling_pb2.DeleteScalingRuleResponse()

    @refuses
    async def ExplainScaling(self, request: Any, context: Any) -> scaling_pb2.ExplainScalingResponse:
        self.fake.called("ExplainScaling")
        self.rules(request.name)
        answer = scaling_pb2.ExplainScalingResponse()
        answer.CopyFrom(self.fake.scaling)
        del answer.decisions[request.decisions_max or 20 :]
        return answer

    @refuses
    async def GetMeasurements(self, request: Any, context: Any) -> scaling_pb2.GetMeasurementsResponse:
        self.fake.called("GetMeasurements")
        return self.fake.measurements
