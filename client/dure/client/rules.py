"""Calls about scaling rules, and what is measured."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Unpack

from google.protobuf import field_mask_pb2

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.client.rule_notation import RuleFields, rule_of
from dure.v1 import scaling_pb2, scaling_pb2_grpc
from dure.v1.scaling_pb2 import ExplainScalingResponse, GetMeasurementsResponse, ScalingRule
from dure.wire import names


@dataclass(frozen=True)
class Kept:
    """A rule as it is stored, and what looks wrong with it."""

    rule: ScalingRule
    warnings: tuple[str, ...] = ()


class RuleGroup:
    """`client.rules`."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = scaling_pb2_grpc.ScalingServiceStub(caller.channel)

    async def add(self, endpoint: str, name: str = "", **fields: Unpack[RuleFields]) -> Kept:
        """Without a `name` it is `rule-1`, `rule-2` ... One step up unless told otherwise.

        await client.rules.add("chat", "busy", source="proxy", metric="concurrency", above=8, step=2)
        await client.rules.add("chat", "calm", source="proxy", metric="concurrency", below=2, step=-1)
        """
        rule, _ = rule_of({"step": 1, **fields})
        return await self.put(endpoint, rule, name)

    async def put(self, endpoint: str, rule: ScalingRule, name: str = "") -> Kept:
        """`add`, of a message."""
        request = scaling_pb2.CreateScalingRuleRequest(
            parent=self._endpoint(endpoint), rule_id=name, rule=rule
        )
        # One that is repeated without a name would be made twice.
        response = await self._caller.unary(self._stub.CreateScalingRule, request, idempotent=False)
        return Kept(response.rule, tuple(response.warnings))

    async def get(self, endpoint: str, name: str) -> ScalingRule:
        request = scaling_pb2.GetScalingRuleRequest(name=self.full_name(endpoint, name))
        return (await self._caller.unary(self._stub.GetScalingRule, request)).rule

    def list(self, endpoint: str) -> AsyncGenerator[ScalingRule, None]:
        """Oldest first: those that scale up are looked at in this order, then those that scale down."""

        async def fetch(token: str) -> tuple[list[ScalingRule], str]:
            request = scaling_pb2.ListScalingRulesRequest(
                parent=self._endpoint(endpoint), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListScalingRules, request)
            return [*page.rules], page.next_page_token

        return all_pages(fetch)

    async def update(self, endpoint: str, name: str, **fields: Unpack[RuleFields]) -> Kept:
        """Changes what is given, and nothing else."""
        rule, paths = rule_of(fields)
        return await self.change(endpoint, name, rule, paths)

    async def change(self, endpoint: str, name: str, rule: ScalingRule, paths: Sequence[str]) -> Kept:
        """`update`, of a message and a mask."""
        wanted = ScalingRule()
        wanted.CopyFrom(rule)
        wanted.name = self.full_name(endpoint, name)
        request = scaling_pb2.UpdateScalingRuleRequest(
            rule=wanted, update_mask=field_mask_pb2.FieldMask(paths=paths)
        )
        response = await self._caller.unary(self._stub.UpdateScalingRule, request)
        return Kept(response.rule, tuple(response.warnings))

    async def remove(self, endpoint: str, name: str) -> None:
        request = scaling_pb2.DeleteScalingRuleRequest(name=self.full_name(endpoint, name))
        await self._caller.unary(self._stub.DeleteScalingRule, request, idempotent=False)

    async def explain(self, endpoint: str, *, decisions_max: int = 20) -> ExplainScalingResponse:
        """What its rules see now, what they decided lately and why, and every metric that they could use."""
        request = scaling_pb2.ExplainScalingRequest(
            name=self._endpoint(endpoint), decisions_max=decisions_max
        )
        return await self._caller.unary(self._stub.ExplainScaling, request)

    async def measurements(self) -> GetMeasurementsResponse:
        """`client.measurements`."""
        request = scaling_pb2.GetMeasurementsRequest(parent=names.project(self._project))
        return await self._caller.unary(self._stub.GetMeasurements, request)

    def full_name(self, endpoint: str, name: str) -> str:
        return name if "/" in name else f"{self._endpoint(endpoint)}/rules/{name}"

    def _endpoint(self, name: str) -> str:
        return name if "/" in name else names.endpoint(self._project, name)
